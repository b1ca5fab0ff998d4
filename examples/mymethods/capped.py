"""An editing method: ridge regression, and no batch moves a weight by more than a small share of its norm."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit import EditConfig
from sphere_edit.config import share
from sphere_edit.methods import Method
from sphere_kernels import LowRankUpdate


class CappedRidge(Method):
    """Solve ``min ‖Δ Kᵀ − Rᵀ‖² + 40 ‖Δ‖²`` for every batch, then scale Δ down to ``cap ‖W‖`` where it is longer."""

    settings = {"cap": share(0.01, "Largest norm of an update, as a share of its weight's norm.")}

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        self.cap = config.cap

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """Return ``Δ = Rᵀ (K Kᵀ + 40 I)⁻¹ K`` for keys K ``[b, d]`` and residuals R ``[b, n]``, as two factors."""
        system = keys @ keys.T + 40 * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        return LowRankUpdate(residuals.T.contiguous(), torch.linalg.solve(system, keys))

    def restrain(self, layer: int, update: LowRankUpdate, weight: Tensor, original: Tensor) -> LowRankUpdate:
        """Cap the update; the loop calls this after SPHERE's projection and before it writes."""
        scale = min(1.0, float(self.cap * weight.norm() / update.dense().norm()))
        return LowRankUpdate(scale * update.left, update.right)
