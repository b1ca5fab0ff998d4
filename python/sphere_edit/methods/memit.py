"""MEMIT: least squares against the covariance of the keys of general text, and of earlier edits if asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.history import WithHistory
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import FactoredCovariance, RecursiveLeastSquares


class Memit(WithHistory):
    """Solve ``(w Cov + C + KKᵀ) Δᵀ = K Rᵀ`` for every layer, ``C`` the history or, as published, 0.

    Cov is factored once. With a history the recursion runs on whitened keys, for which ``w Cov`` is the identity.

    Args:
        config: ``covariance_weight`` w, and ``history``.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: a covariance is not positive definite.

    Source: Meng et al., MEMIT (ICLR 2023), equation 14.
    """

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        super().__init__(config, covariances)
        self._covariances = factored(covariances, config.covariance_weight)
        if config.history:
            for layer, covariance in covariances.items():
                self._solvers[layer] = RecursiveLeastSquares(
                    1.0, len(covariance), dtype=torch.float64, device=covariance.device
                )

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`."""
        covariance = self._covariances[layer]
        if self._solvers:
            right = covariance.unwhiten(self._right(layer, covariance.whiten(keys)))
        else:
            right = covariance.solve(keys)
        return LowRankUpdate(residuals.T.contiguous(), right.float())

    def remember(self, layer: int, keys: Tensor) -> None:
        if self._solvers:
            self._right(layer, self._covariances[layer].whiten(keys))


def factored(covariances: Mapping[int, Tensor], weight: float) -> dict[int, FactoredCovariance]:
    """Key covariances by layer, ready to be solved with; raises ValueError naming the layer of one that is not."""
    found = {}
    for layer, covariance in covariances.items():
        try:
            found[layer] = FactoredCovariance(covariance, weight)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}; see covariance_text and covariance_tokens") from error
    return found
