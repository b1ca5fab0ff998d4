"""Argument checks that several operations share; messages name the argument, what is expected and what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from sphere_kernels.dispatch import IMPLS

WIDE = (torch.float64, torch.float32)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)


def matrix(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Require a tensor ``[..., rows, columns]`` of one of a few dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {', '.join(names)} or {last}, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    if value.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions [..., rows, columns], got shape {list(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require two tensors of one dtype."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must be of the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def writable(name: str, value: Tensor) -> None:
    """Require a tensor that owns each of its elements: each stride must step over all that the smaller ones reach."""
    if torch.compiler.is_compiling():  # sizes may be symbols, which cannot be sorted
        return
    if value.is_neg():
        raise ValueError(f"{name} must hold its own values, got a negated view (such as the imag of a conj)")
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name} must own each of its elements, got a view of strides {value.stride()}")
        reach += stride * (size - 1)


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Require one of a few names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def impl(value: Any) -> None:
    """Require the name of an implementation, or ``"auto"``."""
    choice("impl", value, IMPLS)


def flag(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Require a finite real number in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    real: Any = value
    # NaN fails the comparison, and an integer past it would not fit a float.
    if not low <= real <= min(high, sys.float_info.max):
        expected = f"finite and at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Require an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    number(name, value, low, high)
