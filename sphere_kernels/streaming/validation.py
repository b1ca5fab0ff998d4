"""Argument checks of the streaming states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sphere_kernels import checks

SUBSPACES = ("current", "pretrained")
FORMS = ("auto", "dual", "full")


def check_state(
    weight: Any, s: Any, energy_ratio: Any, alpha: Any, refresh_every: Any, subspace: Any, impl: Any
) -> None:
    """Check the arguments of `HypersphereState`."""
    checks.matrix("weight", weight)
    checks.writable("weight", weight)
    checks.number("s", s, low=0)
    checks.number("energy_ratio", energy_ratio, low=0, high=1)
    checks.number("alpha", alpha, low=0, high=1)
    checks.integer("refresh_every", refresh_every, low=1)
    checks.choice("subspace", subspace, SUBSPACES)
    checks.impl(impl)
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got shape {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got NaN or infinity")


def check_right(right: Any, weight: Tensor) -> None:
    """Check a right factor ``[..., b, d]`` for a weight ``[..., n, d]``."""
    checks.matrix("right", right)
    checks.same_device("right", right, "weight", weight)
    *leading, _, d = weight.shape
    expected = [*leading, right.shape[-2], d]
    if list(right.shape) != expected:
        raise ValueError(f"right must be {_shape(leading, 'b', d)} for weight {list(weight.shape)}, {_got(right)}")


def check_factors(left: Any, right: Any, weight: Tensor) -> None:
    """Check an update for a weight ``[..., n, d]``, its values as well."""
    check_right(right, weight)
    checks.matrix("left", left)
    checks.same_device("left", left, "weight", weight)
    *leading, n, _ = weight.shape
    b = right.shape[-2]
    if list(left.shape) != [*leading, n, b]:
        raise ValueError(f"left must be {_shape(leading, n, b)} to go with right {list(right.shape)}, {_got(left)}")
    for name, factor in (("left", left), ("right", right)):
        if not bool(torch.isfinite(factor).all()):
            raise FloatingPointError(f"{name} holds NaN or infinity; the weight is left as it was")


def check_keys(keys: Any, d: int, device: torch.device) -> None:
    """Check a batch of keys ``[b, d]``."""
    checks.matrix("keys", keys)
    if keys.ndim != 2 or keys.shape[1] != d:
        raise ValueError(f"keys must be [b, {d}], {_got(keys)}")
    if keys.device != device:
        raise ValueError(f"keys must be on {device}, got {keys.device}")
    if not bool(torch.isfinite(keys).all()):
        raise FloatingPointError("keys hold NaN or infinity")


def check_loaded(found: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, list[int] | None]]) -> None:
    """Check the names, dtypes and shapes (None: any) of a state to load."""
    if set(found) != set(expected):
        raise ValueError(f"state must hold {sorted(expected)}, got {sorted(found)}")
    for name, (dtype, shape) in expected.items():
        value = found[name]
        if value.dtype != dtype or (shape is not None and list(value.shape) != shape):
            raise ValueError(f"state[{name!r}] must be {dtype} {shape or ''}, got {value.dtype} {list(value.shape)}")


def _shape(leading: list[int], rows: int | str, columns: int) -> str:
    return "[" + ", ".join(map(str, [*leading, rows, columns])) + "]"


def _got(value: Tensor) -> str:
    return f"got shape {list(value.shape)}"
