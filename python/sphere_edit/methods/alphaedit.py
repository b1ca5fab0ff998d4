"""AlphaEdit: ridge least squares within the null space of the key covariance, with a history of all earlier keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_kernels import LowRankUpdate


class AlphaEdit:
    """Solve ``(P(KKᵀ + C) + λI) Δᵀ = P K Rᵀ`` for every layer, ``P`` the null-space projector, ``C`` the history.

    With ``P = B Bᵀ`` the solution lies in the span of ``B`` ``[d, m]``. In its coordinates the system is symmetric, and
    by the push-through identity a batch of ``b`` facts costs O(m²b) through ``H = (λI + Bᵀ C B)⁻¹`` ``[m, m]``, kept in
    fp64 and updated by recursive least squares; the update comes out as factors. Published code solves with d×d.

    Args:
        config: ``ridge`` λ, ``null_space_threshold``, and ``null_space``: off, ``B`` is the identity.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: the threshold leaves a layer no null space.

    Source: Fang et al., AlphaEdit (ICLR 2025), equation 14; DESIGN: streaming.
    """

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        self.null_space_rank: dict[int, int] = {}
        self._basis: dict[int, Tensor | None] = {}
        self._inverse: dict[int, Tensor] = {}
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, covariance in covariances.items():
            basis = null_space(covariance, config.null_space_threshold, layer) if config.null_space else None
            m = covariance.shape[0] if basis is None else basis.shape[1]
            self._basis[layer] = basis
            self._inverse[layer] = torch.eye(m, dtype=torch.float64, device=covariance.device) / config.ridge
            self.null_space_rank[layer] = m

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`; the factors are fp32: ``left = Rᵀ`` ``[n, b]``, ``right`` ``[b, d]``."""
        basis = self._basis[layer]
        k = keys.double() if basis is None else keys.double() @ basis  # [b, m]
        hk = k @ self._inverse[layer]  # [b, m]
        system = torch.eye(len(k), dtype=k.dtype, device=k.device) + hk @ k.T
        right = torch.linalg.solve((system + system.T) / 2, hk)  # [b, m]
        self._pending[layer] = (hk, right)
        right = right if basis is None else right @ basis.T
        return LowRankUpdate(residuals.T.float().contiguous(), right.float())

    def commit(self) -> None:
        for layer, (hk, right) in self._pending.items():
            self._inverse[layer] -= hk.T @ right
        self._pending.clear()

    def rollback(self) -> None:
        self._pending.clear()


def null_space(covariance: Tensor, threshold: float, layer: int) -> Tensor:
    """Eigenvectors ``[d, m]`` of the covariance whose eigenvalues are below ``threshold``."""
    values, vectors = torch.linalg.eigh(covariance)
    small = values < threshold
    if not small.any():
        raise ValueError(
            f"layer {layer}: no eigenvalue of the key covariance is below null_space_threshold = {threshold:g} "
            f"(smallest {values[0].item():.3g}, largest {values[-1].item():.3g}); expected a larger threshold"
        )
    return vectors[:, small].contiguous()
