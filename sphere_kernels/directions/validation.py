"""Argument checks of the principal directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels._common import checks
from sphere_kernels._common.rows import EPSILON, compute_dtype
from sphere_kernels.directions.types import PrincipalDirections

METHODS = ("auto", "eigh", "svd", "subspace", "tracked")


def check_directions(
    weight: Any, energy_ratio: Any, rank: Any, method: Any, start: Any, tolerance: Any, impl: Any
) -> Tensor | None:
    """Check the arguments of `principal_directions` but for the values of the weight; returns the start's basis."""
    checks.matrix("weight", weight)
    if weight.numel() == 0:
        raise ValueError(f"weight must have at least one element, got shape {list(weight.shape)}")
    checks.number("energy_ratio", energy_ratio, low=0, high=1)
    if rank is not None:
        checks.integer("rank", rank, low=0, high=min(weight.shape[-2:]))
    checks.choice("method", method, METHODS)
    if tolerance is not None:
        checks.number("tolerance", tolerance, low=0, high=1)
    for name, value in (("start", start), ("tolerance", tolerance)):
        if value is not None and method in ("eigh", "svd"):
            raise ValueError(f"{name} must be None for method={method!r}, which is exact; expected another method")
    for name, value in (("rank", rank), ("tolerance", tolerance)):
        if value is not None and method == "tracked":
            raise ValueError(f"{name} must be None for method='tracked', which keeps to energy_ratio, got {value}")
    checks.impl(impl)
    return None if start is None else _check_start(weight, start)


def check_norms(weight: Tensor, norm: Tensor) -> None:
    """Check that the fp64 norms of the rows, ``[batch, n]``, are finite and that no matrix is zero."""
    if not torch.isfinite(norm).all():
        if not torch.isfinite(weight).all():
            raise ValueError("weight must be finite, got NaN or infinity")
        raise ValueError("weight must have rows of norm below 1.3e154, got one whose squared norm overflows float64")
    info = torch.finfo(compute_dtype(weight))
    # Below this the squared unit rows w / (|w| + 1e-8) lose their digits to underflow.
    zero = (norm <= EPSILON * (info.tiny / info.eps) ** 0.5).all(-1).reshape(weight.shape[:-2])
    if zero.any():
        which = f"matrices {zero.nonzero().tolist()} of the batch are" if weight.ndim > 2 else "the matrix is"
        raise ValueError(f"weight must have a non-zero row, got a zero matrix: {which} zero")


def _check_start(weight: Tensor, start: Any) -> Tensor:
    basis = start.basis if isinstance(start, PrincipalDirections) else start
    checks.matrix("start", basis)
    if basis.shape[:-1] != weight.shape[:-2] + weight.shape[-1:]:
        expected = [*weight.shape[:-2], weight.shape[-1]]
        raise ValueError(
            f"start must be a basis of shape {expected} and a number of columns, for a weight of shape "
            f"{list(weight.shape)}, got shape {list(basis.shape)}"
        )
    checks.same_device("start", basis, "weight", weight)
    if not torch.isfinite(basis).all():
        raise ValueError("start must be finite, got NaN or infinity")
    return basis.detach()
