"""MEMIT: least squares against the key covariance of general text and, optionally, the keys of earlier edits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, flag, positive
from sphere_edit.methods.history import WithHistory
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import FactoredCovariance, RecursiveLeastSquares


class Memit(WithHistory, name="memit"):
    """Solve ``(w Cov + C + KKᵀ) Δᵀ = K Rᵀ`` for every layer, ``C`` the history or, as published, 0.

    Cov is factored once. With a history the recursion runs on whitened keys, for which ``w Cov`` is the identity.

    Args:
        config: the method's settings and the loop's.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: a covariance is not positive definite.

    Source: Meng et al., MEMIT (ICLR 2023), equation 14.
    """

    settings = {
        "covariance_weight": positive(15000.0, "w: weight of the key covariance in the solve."),
        "history": flag(False, "Solve against the keys of earlier batches too; off as published."),
    }
    presets = {
        "*": {"alpha": 0.8},
        "gpt2-xl": {"covariance_weight": 20000.0},
        # The published 15,000 is about the number of features in Llama-3's keys, so that general text weighs like one
        # edit; keys here have 1,536.
        "smollm2-135m": {"covariance_weight": 1500.0},
    }

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
    """Factor the key covariances by layer; a ValueError names the layer of one that cannot be factored."""
    found = {}
    for layer, covariance in covariances.items():
        try:
            found[layer] = FactoredCovariance(covariance, weight)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}; see covariance_text and covariance_tokens") from error
    return found
