"""The history of keys that a method solves against, for every layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.records import over, under
from sphere_kernels.streaming import RecursiveLeastSquares


class History(dict[int, RecursiveLeastSquares]):
    """Solvers by layer; what was solved since the last commit is forgotten or kept for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._solved: set[int] = set()

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """See `RecursiveLeastSquares.solve`."""
        right = self[layer].solve(keys)
        self._solved.add(layer)
        return right

    def commit(self) -> None:
        for layer in sorted(self._solved):
            self[layer].commit()
        self._solved.clear()

    def rollback(self) -> None:
        self._solved.clear()

    def state_dict(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer, solver in self.items():
            found |= over(layer, solver.state_dict())
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._solved.clear()
        for layer, solver in self.items():
            solver.load_state_dict(under(layer, state))
