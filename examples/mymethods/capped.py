"""An editing method: ridge regression, and no batch moves a weight by more than a small share of its norm."""

import torch
from torch import Tensor

from sphere_edit.methods import Method
from sphere_kernels import LowRankUpdate


class CappedRidge(Method):
    """Solve ``min ‖Δ Kᵀ − Rᵀ‖² + RIDGE ‖Δ‖²`` for every batch, then scale Δ down to ``CAP ‖W‖`` where it is longer."""

    RIDGE = 40.0
    CAP = 0.006

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """Return ``Δ = Rᵀ (K Kᵀ + RIDGE I)⁻¹ K`` for keys K ``[b, d]`` and residuals R ``[b, n]``, as two factors."""
        system = keys @ keys.T + self.RIDGE * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        return LowRankUpdate(residuals.T.contiguous(), torch.linalg.solve(system, keys))

    def restrain(self, layer: int, update: LowRankUpdate, weight: Tensor, original: Tensor) -> LowRankUpdate:
        """Cap the update; the loop calls this after SPHERE's projection and before it writes."""
        scale = min(1.0, float(self.CAP * weight.norm() / update.dense().norm()))
        return LowRankUpdate(scale * update.left, update.right)
