"""One layer edited batch after batch: as published, and by a plain streaming version.

Both ways hold a weight ``[n, d]``, changed in place, and take ``keys [b, d]`` and residuals ``left [n, b]``. Every
tensor has the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import directions, energy, gram


class AlphaEdit:
    """The published solve: ``(P (K K^T + C) + lambda I) X = P K R^T`` by LU, with C the history of keys: four or five
    d x d."""

    def __init__(self, projector: Tensor, history: Tensor, ridge: float) -> None:
        self.projector, self.history, self.ridge = projector, history, ridge

    def solve(self, keys: Tensor, left: Tensor) -> Tensor:
        """The dense update ``[n, d]``."""
        k, eye = keys.T, torch.eye(keys.shape[1], dtype=keys.dtype)
        system = self.projector @ (k @ k.T + self.history) + self.ridge * eye
        return torch.linalg.solve(system, self.projector @ k @ left.T).T

    def commit(self, keys: Tensor) -> None:
        self.history += keys.T @ keys


class Memit:
    """The published solve: ``(covariance + K K^T) X = K`` by LU, for the weighted covariance: two d x d."""

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = covariance

    def solve(self, keys: Tensor, left: Tensor) -> Tensor:
        """The dense update ``[n, d]``."""
        k = keys.T
        return left @ torch.linalg.solve(self.covariance + k @ k.T, k).T

    def commit(self, keys: Tensor) -> None:
        """Does nothing: MEMIT has no history."""


class Published:
    """A solve with SPHERE on top, as published: directions from the d x d second moment, a d x d projector, the n x d
    update, and the energy of the whole weight (by the fastest plain way)."""

    def __init__(self, weight: Tensor, solver: AlphaEdit | Memit, energy_ratio: float, alpha: float) -> None:
        self.weight, self.solver = weight, solver
        self.energy_ratio, self.alpha = energy_ratio, alpha

    def write(self, update: Tensor) -> None:
        basis = directions.published(self.weight, self.energy_ratio)
        self.weight += update @ (torch.eye(len(basis), dtype=basis.dtype) - self.alpha * (basis @ basis.T))

    def batch(self, keys: Tensor, left: Tensor, again: Tensor | None = None) -> float:
        """Edit a batch and return the new energy; ``again`` holds the keys for the history if different."""
        self.write(self.solver.solve(keys, left))
        self.solver.commit(keys if again is None else again)
        return float(energy.chunked_triangle(self.weight))


class Streamed:
    """Recursive least squares on ``H = (lambda I + P C P)^-1`` ``[d, d]``, with ``M = W W^T`` updated in each batch,
    directions from M, and updates kept as factors.

    Args:
        removed: ``Q [d, d - m]``, ``P = I - Q Q^T``.
        inverse: H, changed in place.
        basis: form U; else use ``U = X^T A``, with X the unit rows.
        update: updates M and computes the energies of the neurons.
    """

    def __init__(
        self,
        weight: Tensor,
        removed: Tensor,
        inverse: Tensor,
        energy_ratio: float,
        alpha: float,
        refresh_every: int,
        basis: bool = True,
        update: Callable[..., gram.Result] = gram.chunked,
    ) -> None:
        self.weight, self.removed, self.inverse = weight, removed, inverse
        self.energy_ratio, self.alpha, self.refresh_every = energy_ratio, alpha, refresh_every
        self.basis, self.update = basis, update
        self.gram, self.batches = weight @ weight.T, 0

    def batch(self, keys: Tensor, left: Tensor, again: Tensor | None = None) -> float:
        """Edit a batch and return the new energy; ``again`` holds the keys for the history if different."""
        right, step = self._solve(keys)
        if self.batches % self.refresh_every == 0:
            self._refresh()
        self.batches += 1
        right = right - self.alpha * self._along(right)
        self.gram, energies = self.update(self.gram, left, self.weight @ right.T, right @ right.T)
        self.weight.addmm_(left, right)
        if again is not None:
            _, step = self._solve(again)
        self.inverse.addmm_(*step, alpha=-1)
        return float(energies.sum())

    def _solve(self, keys: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The right factor, and the two factors to subtract from H when the keys join the history."""
        k = keys - (keys @ self.removed) @ self.removed.T
        hk = k @ self.inverse
        right = torch.linalg.solve(torch.eye(len(k), dtype=k.dtype) + hk @ k.T, hk)
        return right, (hk.T, right)

    def _refresh(self) -> None:
        norms = self.gram.diagonal().sqrt() + 1e-8
        values, vectors = torch.linalg.eigh(self.gram / norms / norms[:, None])
        values, vectors = values.flip(0), vectors.flip(1)
        r = directions.rank(values, self.energy_ratio)
        self._factor = vectors[:, :r] * values[:r].rsqrt()
        self._unit = self.weight / norms[:, None]
        if self.basis:
            self._directions = self._unit.T @ self._factor

    def _along(self, right: Tensor) -> Tensor:
        """``right U U^T``."""
        if self.basis:
            return (right @ self._directions) @ self._directions.T
        return (right @ self._unit.T @ self._factor @ self._factor.T) @ self._unit
