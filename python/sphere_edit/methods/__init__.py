"""Editors: how the update of one weight follows from keys and residuals.

A method is a class with `Method`'s functions; SPHERE's projection comes after any of them. To add one, write it in a
file of its own and name it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.methods.alphaedit import AlphaEdit
from sphere_edit.methods.memit import Memit
from sphere_kernels import LowRankUpdate


class Method(Protocol):
    """Solves for updates layer by layer and remembers what it has written, batch by batch."""

    def solve(self, layer: int, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
        """The update ``[n, d]`` of this layer for keys ``[b, d]`` and residuals ``[b, n]``: fp32 factors,
        the left one ``[n, b]`` the residuals."""

    def commit(self) -> None:
        """The batch solved for has been written in every layer: add it to the history."""

    def rollback(self) -> None:
        """The batch was not written: forget what was solved since the last commit."""

    def state_dict(self) -> dict[str, Tensor]:
        """The history, by reference."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of a method made alike; raises ValueError for another, before anything changes."""


METHODS: dict[str, Callable[[EditConfig, Mapping[int, Tensor]], Method]] = {
    "alphaedit": AlphaEdit,
    "memit": Memit,
}


def make_method(config: EditConfig, covariances: Mapping[int, Tensor]) -> Method:
    """The method that the configuration names, for the layers of ``covariances`` ``{layer: [d, d]}``."""
    check_method(config)
    return METHODS[config.method](config, covariances)


def check_method(config: EditConfig) -> None:
    if config.method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {config.method!r}")
