"""The base class of editing methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sphere_edit.config import COMMON, METHODS, TARGETS, ConfigError, EditConfig, Setting
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


class Method:
    """Base class: a method solves for updates layer by layer and keeps a history of the written batches.

    A method defines `solve` and overrides other functions as needed; here they do nothing. In a batch, every layer is
    solved for, and its update reshaped, projected (SPHERE), restrained and written, before the next layer is solved
    for. With ``project: batch`` all layers are solved for first; with ``project: solve`` the keys come half projected.

    A class with ``name=`` is a method of that name: ``class Mine(Method, name="mine")``. A class in a module of your
    own needs no name: users name it as ``package.module:Class``.

    Attributes:
        settings: the settings that this method declares, by name. They are checked, recorded and resumed like all
            others, and are attributes of ``config``.
        presets: ``{preset: settings}``, the settings, of any kind, that this method changes in a preset; ``"*"``
            changes every preset.
        place: the depth, as a share, of the one block that the method edits by default; None for five blocks.
        trains: training gives the updates (`sphere_edit.methods.fine_tuning`), not `solve`; the method gets no
            covariances.
        projects: the loop does not project this method's updates; `finish` does.
        dense: updates are matrices, not factors; the room that a run takes depends on it.

    Args:
        config: all settings.
        covariances: ``{layer: E[k kᵀ]}`` ``[d, d]`` fp64, of the keys of general text.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    place: ClassVar[float | None] = None
    trains = False
    projects = False
    dense = False

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
        """Change the solved update of ``weight [n, d]`` before it is projected."""
        return update

    def restrain(self, layer: int, update: Update, weight: Tensor, original: Tensor) -> Update:
        """Change the projected update before it is added to ``weight``; ``original`` is the weight before all edits."""
        return update

    def finish(self, layer: int, weight: Tensor, original: Tensor) -> Tensor:
        """The weight ``[n, d]`` to evaluate and save; ``weight`` is the loop's, ``original`` is before all edits."""
        return weight

    def remember(self, layer: int, keys: Tensor) -> None:
        """Take the keys of a batch whose update is known, as `solve` takes them."""

    def commit(self) -> None:
        """Add the solved batch to the history: it has been written in every layer."""

    def rollback(self) -> None:
        """Forget all solves since the last commit: the batch was not written."""

    def state_dict(self) -> dict[str, Tensor]:
        """The history, by reference."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict` of a method made alike; raise ValueError for another, before anything changes."""


def _again(one: object, other: type) -> bool:
    """Whether a notebook's cell was run twice, so that the same class is made anew."""
    return getattr(one, "__qualname__", None) == other.__qualname__ and one.__module__ == other.__module__
