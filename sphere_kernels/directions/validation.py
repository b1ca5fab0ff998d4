"""Argument checks of the principal directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import checks

METHODS = ("auto", "eigh", "svd", "subspace")


def check_directions(weight: Any, energy_ratio: Any, rank: Any, method: Any, impl: Any) -> None:
    """Check the arguments of `principal_directions`, the values of the weight included."""
    checks.matrix("weight", weight)
    checks.number("energy_ratio", energy_ratio, low=0, high=1)
    if rank is not None:
        checks.integer("rank", rank, low=0, high=min(weight.shape[-2:]))
    checks.choice("method", method, METHODS)
    checks.impl(impl)
    _check_values(weight)


def check_unit_rows(unit: Tensor) -> None:
    """Check that no row was too long to normalise."""
    if not torch.isfinite(unit).all():
        raise ValueError("weight must have rows of norm below 1.3e154, got one whose squared norm overflows float64")


def _check_values(weight: Tensor) -> None:
    if weight.numel() == 0:
        raise ValueError(f"weight must have at least one element, got shape {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight must be finite, got NaN or infinity")
    zero = (weight == 0).flatten(-2).all(-1)
    if zero.any():
        which = f"matrices {zero.nonzero().tolist()} of the batch are" if weight.ndim > 2 else "the matrix is"
        raise ValueError(f"weight must have a non-zero row, got a zero matrix: {which} zero")
