"""Editors: how the update of one weight follows from keys and residuals.

A method is a class with `Method`'s functions; SPHERE's projection comes after any of them. To add one, write it in a
file of its own and name it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.methods.alphaedit import AlphaEdit
from sphere_edit.methods.base import Method, Update
from sphere_edit.methods.ft import FineTuning
from sphere_edit.methods.memit import Memit
from sphere_edit.methods.prune import Prune
from sphere_edit.methods.rect import Rect
from sphere_edit.methods.rome import Rome

__all__ = ["METHODS", "Method", "Update", "make_method", "method_class"]

METHODS: dict[str, type[Method]] = {
    "alphaedit": AlphaEdit,
    "memit": Memit,
    "rect": Rect,
    "prune": Prune,
    "rome": Rome,
    "ft": FineTuning,
}


def make_method(config: EditConfig, covariances: Mapping[int, Tensor]) -> Method:
    """The method that the configuration names, for the layers of ``covariances`` ``{layer: [d, d]}``."""
    return method_class(config)(config, covariances)


def method_class(config: EditConfig) -> type[Method]:
    if config.method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {config.method!r}")
    return METHODS[config.method]
