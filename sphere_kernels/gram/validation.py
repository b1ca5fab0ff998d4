"""Argument checks of the Gram matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import checks

GRAM_DTYPES = (torch.float64, torch.float32)


def check_gram(weight: Any, normalize: Any, impl: Any) -> None:
    """Check the arguments of `gram`."""
    checks.matrix("weight", weight)
    checks.flag("normalize", normalize)
    checks.impl(impl)


def check_update(gram: Any, left: Any, cross: Any, inner: Any, weight: Any, impl: Any) -> None:
    """Check the tensors of `gram_update_energy_`."""
    checks.matrix("gram", gram, GRAM_DTYPES)
    *leading, n, columns = gram.shape
    if n != columns:
        raise ValueError(f"gram must be square, [..., n, n], got shape {list(gram.shape)}")
    checks.writable("gram", gram)
    checks.matrix("left", left)
    b = left.shape[-1]
    for name, factor, shape in (
        ("left", left, [*leading, n, b]),
        ("cross", cross, [*leading, n, b]),
        ("inner", inner, [*leading, b, b]),
    ):
        checks.matrix(name, factor)
        checks.same_dtype(name, factor, "gram", gram)
        _fits(name, factor, shape, gram)
    if weight is not None:
        checks.matrix("weight", weight)
        _fits("weight", weight, [*leading, n, weight.shape[-1]], gram)
    checks.impl(impl)


def _fits(name: str, value: Tensor, shape: list[int], gram: Tensor) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to follow gram {list(gram.shape)}, got {list(value.shape)}")
    checks.same_device(name, value, "gram", gram)
