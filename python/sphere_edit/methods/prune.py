"""PRUNE: MEMIT, with the singular values of all that was added held down to those of the weight before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.base import Update
from sphere_edit.methods.memit import Memit
from sphere_kernels import LowRankUpdate


class Prune(Memit):
    """MEMIT; of the sum of all updates, singular values ``s`` above ``m``, the largest of the weight before, are
    written as ``min(s, m + log(s / m))``.

    The sum is not stored: it follows from the weight, since that function has an inverse. Published code writes its
    updates whole, and this to copies of the weight when it evaluates; here later batches are solved for the weight that
    is used. Below ``m = 1`` the published ``m + log(s / m)`` would enlarge what is little above m.

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
        total = weight.double() - original.double()
        whole = _changed(total, limit, lambda s: torch.maximum(s, limit * (s - limit).exp()))
        for part in (whole, update):
            total.addmm_(part.left.double(), part.right.double())
        held = _changed(total, limit, lambda s: torch.minimum(s, limit + (s / limit).log()))
        parts = (update, whole, held)
        return LowRankUpdate(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts]))


def _changed(matrix: Tensor, limit: Tensor, change: Callable[[Tensor], Tensor]) -> LowRankUpdate:
    """What to add, in fp32, to a matrix ``[n, d]`` in order to change its singular values above a limit."""
    if matrix.norm() <= limit:  # there are none
        return LowRankUpdate(matrix[:, :0].float(), matrix[:0].float())
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    large = squares > limit.square()
    values, vectors = squares[large].sqrt(), vectors[:, large]
    return LowRankUpdate((vectors * (change(values) / values - 1)).float(), (vectors.T @ matrix).float())
