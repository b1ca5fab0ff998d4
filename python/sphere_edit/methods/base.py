"""What every editing method is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sphere_edit.config import COMMON, METHODS, TARGETS, ConfigError, EditConfig, Setting
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


class Method:
    """Solves for updates layer by layer and remembers what it has written, batch by batch.

    A method defines `solve`, and what else differs from the functions here, which do nothing. In a batch every layer is
    solved for, reshaped, projected (SPHERE), restrained and written before the next one is solved for; with ``project:
    batch`` all are solved for first, and with ``project: solve`` keys come half projected.

    A class with ``name=`` is a method of that name: ``class Mine(Method, name="mine")``. A class of one's own elsewhere
    needs none; it is named ``package.module:Class``.

    Attributes:
        settings: that this method declares, by name; they are checked, recorded and resumed like all others, and read
            from ``config``.
        presets: ``{preset: settings}``, any settings, for presets that are changed by choosing this method; ``"*"``
            for all of them.
        place: share of the depth at which the one block is that it edits by default; None for five blocks.
        trains: updates come of training the weights (`sphere_edit.methods.fine_tuning`), and not of `solve`: the method
            gets no covariances.
        projects: SPHERE's projection is not of the updates; the method does its own in `finish`.

    Args:
        config: all settings.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64, of the keys of general text.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    place: ClassVar[float | None] = None
    trains = False
    projects = False

    def __init_subclass__(cls, name: str | None = None) -> None:
        """Raise ConfigError for a setting, or a name, that stands for something else."""
        super().__init_subclass__()
        for key in cls.settings:
            if key in COMMON or hasattr(EditConfig, key):
                raise ConfigError(f"{cls.__name__}: settings: {key!r} is the loop's; expected another name")
        if name is None:
            return
        if name in METHODS and not _again(METHODS[name], cls):
            raise ConfigError(f"{cls.__name__}: {name!r} is a method already; expected another name")
        for user, other in (*METHODS.items(), *TARGETS.items()):
            for key in cls.settings.keys() & other.settings.keys():
                if cls.settings[key] != other.settings[key] and not _again(other, cls):
                    raise ConfigError(
                        f"{cls.__name__}: settings: {key!r} is a setting of {user}; expected another name"
                    )
        METHODS[name] = cls

    @classmethod
    def check(cls, config: EditConfig) -> None:
        """Raise ConfigError where settings do not go together with this method."""

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


def _again(one: object, other: type) -> bool:
    """Whether a class is another made anew, as by a notebook's cell that is run twice."""
    return getattr(one, "__qualname__", None) == other.__qualname__ and one.__module__ == other.__module__
