"""RECT: MEMIT's update, cut to the entries that change their weight most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, share
from sphere_edit.methods.memit import Memit
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


class Rect(Memit, name="rect"):
    """MEMIT's update: keep the share ``rect_share`` of its entries with the largest ``|Δ / W|``, set the rest to zero.

    SPHERE projects after the cut: the written update stays out of the principal directions, and no entry is zero any
    more.

    Source: Gu et al., Model Editing Harms General Abilities of Large Language Models (EMNLP 2024).
    """

    settings = Memit.settings | {"rect_share": share(0.4, "The share of an update's entries that RECT keeps.")}
    dense = True

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        super().__init__(config, covariances)
        self._share = config.rect_share

    def reshape(self, layer: int, update: LowRankUpdate, weight: Tensor) -> Update:
        dense = update.left @ update.right
        change = (dense / weight.to(dense.dtype)).abs_().nan_to_num_(torch.inf)  # 0 / 0 too: nothing is lost there
        kept = change.flatten().topk(round(self._share * change.numel()), sorted=False).indices
        out = torch.zeros_like(dense)
        out.view(-1)[kept] = dense.view(-1)[kept]
        return out
