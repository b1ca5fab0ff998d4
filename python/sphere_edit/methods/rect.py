"""RECT: of MEMIT's update only the entries that change their weight most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, share
from sphere_edit.methods.memit import Memit
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


class Rect(Memit, name="rect"):
    """MEMIT's update, of which the share ``rect_share`` with the largest ``|Δ / W|`` is kept and the rest is zero.

    With SPHERE the projection comes after that: what leaves the principal directions stays out of them, and no entry
    is zero any more.

    Source: Gu et al., Model Editing Harms General Abilities of Large Language Models (EMNLP 2024).
    """

    settings = Memit.settings | {"rect_share": share(0.4, "Share of the entries of its update that RECT keeps.")}

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
