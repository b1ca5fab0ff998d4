"""Argument checks of the streaming states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sphere_kernels._common import checks

SUBSPACES = ("current", "pretrained")
DIRECTIONS = ("exact", "tracked")
FORMS = ("auto", "dual", "full")
Expected = dict[str, tuple[torch.dtype, list[int | None]]]  # of a state to load: dtypes and shapes, None any size


def check_state(
    weight: Any,
    s: Any,
    energy_ratio: Any,
    alpha: Any,
    refresh_every: Any,
    subspace: Any,
    directions: Any,
    impl: Any,
) -> None:
    """Check the arguments of `HypersphereState`."""
    checks.matrix("weight", weight)
    checks.writable("weight", weight)
    checks.number("s", s, low=0)
    checks.number("energy_ratio", energy_ratio, low=0, high=1)
    checks.number("alpha", alpha, low=0, high=1)
    checks.integer("refresh_every", refresh_every, low=1)
    checks.choice("subspace", subspace, SUBSPACES)
    checks.choice("directions", directions, DIRECTIONS)
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
    """Check the factors of an update for a weight ``[..., n, d]``; without ``left``, the update."""
    check_right(right, weight)
    if left is None:
        if right.shape != weight.shape:
            raise ValueError(f"without left, right must be {list(weight.shape)} as the weight, {_got(right)}")
        return
    checks.matrix("left", left)
    checks.same_device("left", left, "weight", weight)
    *leading, n, _ = weight.shape
    b = right.shape[-2]
    if list(left.shape) != [*leading, n, b]:
        raise ValueError(f"left must be {_shape(leading, n, b)} to go with right {list(right.shape)}, {_got(left)}")


def check_finite(left: Tensor | None, right: Tensor) -> None:
    """Check the values of an update."""
    for name, factor in (("left", left), ("right", right)):
        if factor is not None and not bool(torch.isfinite(factor).all()):
            raise FloatingPointError(f"{name} holds NaN or infinity in {factor.dtype}; the weight is left as it was")


def check_reach(reach: Tensor, weight: Tensor, computed: torch.dtype) -> None:
    """Check that rows of length ``reach`` fit the weight's dtype, and their squares the dtype computed in."""
    most = min(torch.finfo(weight.dtype).max, (torch.finfo(computed).max / 4) ** 0.5)
    if not bool((reach < most).all()):
        raise FloatingPointError(
            f"rows of the weight must stay shorter than {most:.3g}, but may come to {float(reach.max()):.3g}; "
            "the weight is left as it was"
        )


def check_null_space(value: Any, d: int) -> None:
    """Check a split basis of ``d`` features."""
    parts = [getattr(value, "kept", None), getattr(value, "removed", None)]
    given = [part for part in parts if isinstance(part, Tensor)]
    if not given or any(part is not None and not isinstance(part, Tensor) for part in parts):
        raise TypeError(f"null_space must be a NullSpace of tensors or None, got {type(value).__name__}")
    shapes = [list(part.shape) for part in given]
    columns = sum(shape[-1] for shape in shapes)
    if any(shape != [d, shape[-1]] for shape in shapes) or columns > d or (len(given) == 2 and columns != d):
        raise ValueError(
            f"null_space must split {d} features, kept [{d}, m] and removed [{d}, {d} - m], got "
            f"{' and '.join(map(str, shapes))}"
        )
    if not bool(torch.isfinite(value.part).all()):
        raise ValueError("null_space must be finite, got NaN or infinity")


def check_keys(keys: Any, d: int, device: torch.device) -> None:
    """Check a batch of keys ``[b, d]``."""
    checks.matrix("keys", keys)
    if keys.ndim != 2 or keys.shape[1] != d:
        raise ValueError(f"keys must be [b, {d}], {_got(keys)}")
    if keys.device != device:
        raise ValueError(f"keys must be on {device}, got {keys.device}")
    if not bool(torch.isfinite(keys).all()):
        raise FloatingPointError("keys hold NaN or infinity")


def check_loaded(found: Mapping[str, Tensor], expected: Expected) -> None:
    """Check the names, dtypes and shapes of a state to load, and that its counts are none below 0."""
    if set(found) != set(expected):
        raise ValueError(f"state must hold {sorted(expected)}, got {sorted(found)}")
    for name, (dtype, shape) in expected.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"state[{name!r}] must be a tensor, got {type(value).__name__}")
        if (
            value.dtype != dtype
            or len(value.shape) != len(shape)
            or any(size not in (None, own) for size, own in zip(shape, value.shape, strict=True))
        ):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"state[{name!r}] must be {dtype} [{sizes}], got {value.dtype} {list(value.shape)}")
        if value.ndim == 0 and not value >= 0:
            raise ValueError(f"state[{name!r}] must be a count, got {value.item()}")


def _shape(leading: list[int], rows: int | str, columns: int) -> str:
    return "[" + ", ".join(map(str, [*leading, rows, columns])) + "]"


def _got(value: Tensor) -> str:
    return f"got shape {list(value.shape)}"
