"""MEMIT: least squares against the covariance of the keys of general text, and of earlier edits if asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.base import Method
from sphere_edit.methods.history import History
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import FactoredCovariance, RecursiveLeastSquares


class Memit(Method):
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
        self._covariances = factored(covariances, config.covariance_weight)
        self._history = History()
        if config.history:
            for layer, covariance in covariances.items():
                self._history[layer] = RecursiveLeastSquares(
                    1.0, len(covariance), dtype=torch.float64, device=covariance.device
                )

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`."""
        covariance = self._covariances[layer]
        if self._history:
            right = covariance.unwhiten(self._history.solve(layer, covariance.whiten(keys)))
        else:
            right = covariance.solve(keys)
        return LowRankUpdate(residuals.T.contiguous(), right.float())

    def remember(self, layer: int, keys: Tensor) -> None:
        if self._history:
            self._history.solve(layer, self._covariances[layer].whiten(keys))

    def commit(self) -> None:
        self._history.commit()

    def rollback(self) -> None:
        self._history.rollback()

    def state_dict(self) -> dict[str, Tensor]:
        return self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._history.load_state_dict(state)


def factored(covariances: Mapping[int, Tensor], weight: float) -> dict[int, FactoredCovariance]:
    """Key covariances by layer, ready to be solved with; raises ValueError naming the layer of one that is not."""
    found = {}
    for layer, covariance in covariances.items():
        try:
            found[layer] = FactoredCovariance(covariance, weight)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}; see covariance_text and covariance_tokens") from error
    return found
