"""ROME: the smallest update, measured on the keys of general text, that makes the wanted changes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.base import Method
from sphere_edit.methods.memit import factored
from sphere_kernels import LowRankUpdate


class Rome(Method, name="rome"):
    """Minimise ``tr(Δ Cov Δᵀ)`` under ``Δ K = R``: ``Δ = R (Kᵀ Cov⁻¹ K)⁺ Kᵀ Cov⁻¹``.

    For one fact (``batch_size: 1``) this is ROME's rank-one update; for several, one update for all. Equal or nearly
    equal keys, for example of one subject in several facts, are fitted in the least-squares sense.

    Args:
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: a covariance is not positive definite.

    Source: Meng et al., Locating and Editing Factual Associations in GPT (NeurIPS 2022), equation 2.
    """

    place = 5 / 32
    presets = {
        "*": {"layers": ()},
        "llama3-8b": {"layers": (5,), "value_lr": 0.5, "value_weight_decay": 1e-3, "value_clamp": 4.0},
        "qwen2.5-7b": {"layers": (5,)},
        "gpt2-xl": {"layers": (17,)},
        "gpt-j-6b": {"layers": (5,)},
    }

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        self._covariances = factored(covariances, 1.0)

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`."""
        return LowRankUpdate(residuals.T.contiguous(), self._covariances[layer].solve_exactly(keys).float())
