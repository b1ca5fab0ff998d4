"""MEMIT: least squares against the covariance of the keys of general text, without a history."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import FactoredCovariance


class Memit:
    """Solve ``(w Cov + KKᵀ) Δᵀ = K Rᵀ`` for every layer; see `sphere_kernels.streaming.FactoredCovariance`.

    Args:
        config: ``covariance_weight`` w.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: a covariance is not positive definite.

    Source: Meng et al., MEMIT (ICLR 2023), equation 14.
    """

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        self._solvers: dict[int, FactoredCovariance] = {}
        for layer, covariance in covariances.items():
            try:
                self._solvers[layer] = FactoredCovariance(covariance, config.covariance_weight)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}; see covariance_text and covariance_tokens") from error

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`."""
        return LowRankUpdate(residuals.T.contiguous(), self._solvers[layer].solve(keys).float())

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
