"""PRUNE: MEMIT, with the singular values of all that was added held down to those of the weight before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.base import Update
from sphere_edit.methods.memit import Memit
from sphere_kernels import LowRankUpdate


class Prune(Memit):
    """MEMIT, after which singular values ``s`` of the total ``W - W0`` above ``m``, the largest of ``W0``, become
    ``log s - log m + m``.

    Here that is done with every batch, so that later ones are solved for the weight that is used. The published code
    does it to copies of the weight when it evaluates, and goes on from the weight that was not restrained.

    Source: Ma et al., Perturbation-Restrained Sequential Model Editing (ICLR 2025).
    """

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        super().__init__(config, covariances)
        self._limit: dict[int, Tensor] = {}

    def restrain(self, layer: int, update: Update, weight: Tensor, original: Tensor) -> Update:
        assert isinstance(update, LowRankUpdate)
        if layer not in self._limit:
            self._limit[layer] = torch.linalg.matrix_norm(original.double(), 2)
        limit = self._limit[layer]
        total = (weight.double() - original.double()).addmm_(update.left.double(), update.right.double())
        if total.norm() <= limit:  # no singular value is larger
            return update
        squares, vectors = torch.linalg.eigh(total @ total.T)
        large = squares > limit.square()
        values, vectors = squares[large].sqrt(), vectors[:, large]
        change = (values.log() - limit.log() + limit) / values - 1
        return LowRankUpdate(
            torch.cat([update.left, (vectors * change).to(update.left)], 1),
            torch.cat([update.right, (vectors.T @ total).to(update.right)]),
        )
