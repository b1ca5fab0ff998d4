"""What every editing method is made of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_kernels import LowRankUpdate

Update = Tensor | LowRankUpdate  # of a weight: [n, d], or factors [n, b] and [b, d]; fp32


class Method:
    """Solves for updates layer by layer and remembers what it has written, batch by batch.

    A method defines `solve`, and what else differs from the functions here, which do nothing. In a batch every layer is
    solved for, reshaped, projected (SPHERE), restrained and written before the next one is solved for; with ``project:
    batch`` all are solved for first, and with ``project: solve`` keys come half projected.

    Attributes:
        trains: updates come of training the weights (`sphere_edit.methods.fine_tuning`), and not of `solve`: the method
            gets no covariances.
        projects: SPHERE's projection is not of the updates; the method does its own in `finish`.

    Args:
        config: all settings.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64, of the keys of general text.
    """

    trains = False
    projects = False

    def __init__(self, config: EditConfig, covariances: Mapping[int, Tensor]) -> None:
        pass

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """The update ``[n, d]`` of a layer for keys ``[b, d]`` and residuals ``[b, n]``."""
        raise NotImplementedError(f"{type(self).__name__} does not solve for updates")

    def reshape(self, layer: int, update: LowRankUpdate, weight: Tensor) -> Update:
        """The update solved for ``weight [n, d]``, as it shall be projected."""
        return update

    def restrain(self, layer: int, update: Update, weight: Tensor, original: Tensor) -> Update:
        """The projected update, as it shall be added to ``weight``, which was ``original`` before all edits."""
        return update

    def finish(self, layer: int, weight: Tensor, original: Tensor) -> Tensor:
        """The weight ``[n, d]`` to evaluate and save where the loop's is ``weight`` and was ``original`` at first."""
        return weight

    def remember(self, layer: int, keys: Tensor) -> None:
        """As `solve`, for a batch whose update is known."""

    def commit(self) -> None:
        """The batch solved for has been written in every layer: add it to the history."""

    def rollback(self) -> None:
        """The batch was not written: forget what was solved since the last commit."""

    def state_dict(self) -> dict[str, Tensor]:
        """The history, by reference."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a method made alike; raises ValueError for another, before anything changes."""
