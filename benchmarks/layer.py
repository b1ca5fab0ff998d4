"""A synthetic layer under a stream of edits, and our engine, for the benchmarks of the streaming engine."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels.streaming import HypersphereState, NullSpace, RecursiveLeastSquares

EDITS, RIDGE, RATIO, ALPHA = 100, 10.0, 0.5, 0.5
REMOVED = 0.15  # share of dimensions outside the null space; 0.15 to 0.25 in SmolLM2
KEPT_ENERGY, REMOVED_ENERGY = 32.0, 22.0  # of a key inside and outside the null space, as for CounterFact in SmolLM2
MOVE = 0.003  # approximate norm of a batch's update, as a share of the weight's norm


class Layer:
    """A weight ``[n, d]``, a subspace ``removed [d, p]`` outside the null space, and batches of keys and residuals.

    All tensors are fp32 and seeded; keys have a decaying spectrum within the null space and are large outside.
    """

    def __init__(self, n: int, d: int) -> None:
        self.weight = _noise((n, d), 0)
        self.removed = torch.linalg.qr(_noise((d, max(1, int(REMOVED * d))), 1))[0]
        decay = 1 / (1 + 20 * torch.arange(d) / d)
        self._scale = (decay * KEPT_ENERGY / decay.sum()).sqrt()

    @property
    def null_space(self) -> NullSpace:
        return NullSpace(removed=self.removed)

    def keys(self, number: int) -> Tensor:
        """Keys ``[b, d]``, fresh for each batch."""
        d, p = self.removed.shape
        outside = _noise((EDITS, p), 3 * number + 2) * (REMOVED_ENERGY / p) ** 0.5
        return (_noise((EDITS, d), 3 * number + 3) * self._scale).addmm_(outside, self.removed.T)

    def left(self, number: int) -> Tensor:
        """Residuals ``[n, b]``; in the first batch a row of the right factor has a norm of about 0.13."""
        n, d = self.weight.shape
        return _noise((n, EDITS), 3 * number + 4) * (MOVE * (d / EDITS) ** 0.5 / 0.13)


class Engine:
    """Our engine: a weight, changed in place, and a solver."""

    def __init__(
        self, weight: Tensor, solver: RecursiveLeastSquares, refresh_every: int, directions: str = "exact"
    ) -> None:
        self.state = HypersphereState(
            weight, energy_ratio=RATIO, alpha=ALPHA, refresh_every=refresh_every, directions=directions
        )
        self.weight, self.solver = weight, solver

    def batch(self, keys: Tensor, left: Tensor, again: Tensor | None = None) -> float:
        """Edit a batch and return the new energy; ``again`` holds the keys for the history if different."""
        right = self.state.project(self.solver.solve(keys))
        self.state.update_(left, right)
        self.solver.commit(again)
        return float(self.state.energy)


def _noise(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
