"""REVIVE: keep updates out of the leading singular directions of the pretrained weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


class Revive:
    """``ΔW ← (I − U_k U_kᵀ) ΔW (I − V_k V_kᵀ)`` with the k leading singular vectors of the weight before all edits.

    k is the smallest number of leading singular values that make up the share ``mass`` of the sum of all. With ``uᵢ``
    and ``vⱼ`` the singular vectors, the update ``Σ αᵢⱼ uᵢ vⱼᵀ`` keeps the terms with ``i > k`` and ``j > k``.

    The paper publishes the filter and its place after any editor's solve. Ours are the factors in place of dense
    updates, and SPHERE's projection before the filter, so that updates leave the directions alone exactly, with SPHERE
    or without. The sum takes singular values, not their squares: a public reimplementation reads the paper's energy
    this way, with τ = 0.1. That reimplementation takes the vectors of the present weight; this class takes the vectors
    of the pretrained weight, as the paper's text does. The authors' code could not be found to check either choice.

    Attributes:
        left: ``[n, k]`` fp32, the leading left singular vectors.
        right: ``[d, k]`` fp32, the leading right singular vectors.

    Args:
        original: ``[n, d]``, the weight before all edits.
        mass: τ, above 0 and below 1.
        layer: number of the layer, for errors.

    Raises:
        ValueError: the share protects all directions of the smaller side, and no update would be left.

    Source: Zhang et al., Spectral Characterization and Mitigation of Sequential Knowledge Editing Collapse
        (arXiv 2601.11042).
    """

    def __init__(self, original: Tensor, mass: float, layer: int) -> None:
        weight = original.double()
        wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        values = squares.clamp_min(0).sqrt().flip(0)
        k = int((values.cumsum(0) < mass * values.sum()).sum()) + 1
        if k >= len(values):
            raise ValueError(
                f"layer {layer}: revive = {mass:g} protects all {len(values)} singular directions; expected a smaller "
                "share"
            )
        short = vectors.flip(1)[:, :k]
        sides = short.float(), (wide.T @ short / values[:k]).float()
        self.left, self.right = sides if wide is weight else sides[::-1]

    def __call__(self, update: Update) -> Update:
        """The update ``[n, d]``, fp32, without its part in the protected directions."""
        if isinstance(update, LowRankUpdate):
            return LowRankUpdate(_without(update.left, self.left), _without(update.right.T, self.right).T)
        return _without(_without(update, self.left).T, self.right).T


def _without(columns: Tensor, basis: Tensor) -> Tensor:
    """``(I − B Bᵀ) X``."""
    return columns - basis @ (basis.T @ columns)
