"""AlphaEdit: ridge least squares within the null space of the key covariance, with a history of all earlier keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, flag, positive
from sphere_edit.methods.covariance import KeyCovariances
from sphere_edit.methods.history import WithHistory
from sphere_kernels import LowRankUpdate
from sphere_kernels.streaming import NullSpace, RecursiveLeastSquares


class AlphaEdit(WithHistory, name="alphaedit"):
    """Solve ``(P(KKᵀ + C) + λI) Δᵀ = P K Rᵀ`` for every layer, ``P`` the null-space projector, ``C`` the history.

    The solver is `sphere_kernels.streaming.RecursiveLeastSquares`. Published code forms and factors a d×d system, this
    solver never does. Published code recomputes the keys after all layers and adds them to the history. A layer's keys
    depend only on the layers below, and these are final when the layer is solved for: both keys are the same, so the
    solve is reused.

    Args:
        config: the method's settings and the loop's.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64.

    Raises:
        ValueError: the threshold leaves a layer no null space.

    Source: Fang et al., AlphaEdit (ICLR 2025), equation 14.
    """

    settings = {
        "null_space": flag(
            True,
            "Project onto the null space of the key covariance. Off: P is the identity, the solve a ridge regression.",
            "--null-space/--no-null-space",
        ),
        "null_space_threshold": positive(
            2e-2, "Eigenvectors of the key covariance with eigenvalues below this span the null space."
        ),
        "ridge": positive(10.0, "λ of the solve."),
    }

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        super().__init__(config, covariances)
        self.null_space_rank: dict[int, int] = {}
        for layer, covariance in covariances.items():
            space = null_space(covariances, layer, config.null_space_threshold) if config.null_space else None
            d = len(covariance)
            self.null_space_rank[layer] = d if space is None or space.removed is None else d - space.removed.shape[1]
            # Keys are about as long as the keys of the covariance's text; some are a hundred times longer.
            reach = float(covariance.trace()) / config.ridge * torch.finfo(torch.float32).eps
            dtype = torch.float32 if reach < 1e-5 else torch.float64
            self._solvers[layer] = RecursiveLeastSquares(config.ridge, d, space, dtype=dtype, device=covariance.device)

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """See `Method.solve`."""
        return LowRankUpdate(residuals.T.contiguous(), self._right(layer, keys).float())

    def remember(self, layer: int, keys: Tensor) -> None:
        self._right(layer, keys)


def null_space(covariances: Mapping[int, Tensor], layer: int, threshold: float) -> NullSpace:
    """Null space of a layer's covariance ``[d, d]``: the eigenvectors with eigenvalues below ``threshold``."""
    if isinstance(covariances, KeyCovariances):
        values, vectors = covariances.eigh(layer)
    else:
        values, vectors = torch.linalg.eigh(covariances[layer])
    small = values < threshold
    if not small.any():
        raise ValueError(
            f"layer {layer}: no eigenvalue of the key covariance is below null_space_threshold = {threshold:g} "
            f"(smallest {values[0].item():.3g}, largest {values[-1].item():.3g}); expected a larger threshold"
        )
    return NullSpace(vectors[:, small].contiguous(), vectors[:, ~small].contiguous())
