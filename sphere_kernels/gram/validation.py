"""Argument checks of the Gram matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sphere_kernels._common import checks


def check_gram(weight: Any, normalize: Any, impl: Any) -> None:
    """Check the arguments of `gram`."""
    checks.matrix("weight", weight)
    checks.flag("normalize", normalize)
    checks.impl(impl)


def check_kept(gram: Any, weight: Any, impl: Any) -> None:
    """Check the tensors of `gram_energy`."""
    _check_square(gram)
    _check_weight(weight, gram)
    checks.impl(impl)


def check_update(gram: Any, left: Any, cross: Any, inner: Any, weight: Any, impl: Any) -> None:
    """Check the tensors of `gram_update_energy_`."""
    _check_square(gram)
    checks.writable("gram", gram)
    checks.matrix("left", left)
    *leading, n, _ = gram.shape
    b = left.shape[-1]
    for name, factor, shape in (
        ("left", left, [*leading, n, b]),
        ("cross", cross, [*leading, n, b]),
        ("inner", inner, [*leading, b, b]),
    ):
        checks.matrix(name, factor)
        checks.same_dtype(name, factor, "gram", gram)
        _fits(name, factor, shape, gram)
    _check_weight(weight, gram)
    checks.impl(impl)


def _check_square(gram: Any) -> None:
    checks.matrix("gram", gram, checks.WIDE)
    if gram.shape[-2] != gram.shape[-1]:
        raise ValueError(f"gram must be square, [..., n, n], got shape {list(gram.shape)}")


def _check_weight(weight: Any, gram: Tensor) -> None:
    if weight is not None:
        checks.matrix("weight", weight)
        _fits("weight", weight, [*gram.shape[:-1], weight.shape[-1]], gram)


def _fits(name: str, value: Tensor, shape: list[int], gram: Tensor) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to follow gram {list(gram.shape)}, got {list(value.shape)}")
    checks.same_device(name, value, "gram", gram)
