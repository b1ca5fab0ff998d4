"""The base class of methods with a history of keys."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.methods.base import Method
from sphere_edit.state import add_prefix, strip_prefix
from sphere_kernels.streaming import RecursiveLeastSquares


class WithHistory(Method):
    """One recursive solver per layer; a commit or rollback concerns all solves since the last commit."""

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        self._solvers: dict[int, RecursiveLeastSquares] = {}
        self._solved: set[int] = set()

    def _right(self, layer: int, keys: Tensor) -> Tensor:
        """See `RecursiveLeastSquares.solve`."""
        right = self._solvers[layer].solve(keys)
        self._solved.add(layer)
        return right

    def commit(self) -> None:
        for layer in sorted(self._solved):
            self._solvers[layer].commit()
        self._solved.clear()

    def rollback(self) -> None:
        self._solved.clear()

    def state_dict(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer, solver in self._solvers.items():
            found |= add_prefix(layer, solver.state_dict())
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._solved.clear()
        for layer, solver in self._solvers.items():
            solver.load_state_dict(strip_prefix(layer, state))
