"""Sparse projection by the Triton kernels: products that read and write each of the four dtypes in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton.launch import product
from sphere_kernels._common.rows import compute_dtype


def sparse_projection(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """``update - alpha (update U) U^T``, rounded once to the dtype of ``update``."""
    rows = gpu.merged(update)
    out = gpu.fresh(update, tuple(rows.shape), update.dtype)
    _project(rows, update.dtype, basis, alpha, compute_dtype(update, basis), out)
    return out.view(update.shape).to(update.dtype)


def apply_projected_update_(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float) -> None:
    """``weight += left @ projected(right)``; without ``left``, ``right`` is the update itself."""
    rows = gpu.merged(right)
    with gpu.written(weight) as matrices:
        if left is None:
            _project(rows, right.dtype, basis, alpha, compute_dtype(weight, right, basis), matrices, accumulate=True)
            return
        wide = compute_dtype(weight, left, right, basis)
        projected = rows.new_empty(rows.shape, dtype=wide)
        _project(rows, right.dtype, basis, alpha, wide, projected)
        product(gpu.merged(left), projected, matrices, accumulate=True, dtypes=(left.dtype, wide))


def _project(
    update: Tensor,
    dtype: torch.dtype,
    basis: Tensor,
    alpha: float,
    wide: torch.dtype,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    """``out = [out +] update - alpha (update U) U^T``, in ``wide``; ``dtype`` is that the update was given in."""
    directions = gpu.merged(basis)  # one, where the batch shares them
    inner = update.new_empty(*update.shape[:2], basis.shape[-1], dtype=wide)
    product(update, directions, inner, dtypes=(dtype, basis.dtype))
    product(inner.mul_(-alpha), directions.mT, out, addend=update, accumulate=accumulate, dtypes=(wide, basis.dtype))
