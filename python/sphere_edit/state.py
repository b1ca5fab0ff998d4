"""States within states: names of tensors with the prefix of what they belong to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def add_prefix(prefix: object, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state within a larger one: entries ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in state.items()}


def strip_prefix(prefix: object, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `add_prefix` put into a larger state."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
