"""Nested states: the names of tensors, prefixed with the name of their owner."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def add_prefix(prefix: object, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state inside a larger one: ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def strip_prefix(prefix: object, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `add_prefix`: the entries ``prefix.name`` of a larger state, by ``name``."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
