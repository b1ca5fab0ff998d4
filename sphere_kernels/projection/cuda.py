"""Sparse projection by the CUDA kernels: products that read and write each of the four dtypes in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import cuda
from sphere_kernels._backends.native import merged, repeated, view, written
from sphere_kernels._common.rows import compute_dtype


def sparse_projection(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """``update - alpha (update U) U^T``, rounded once to the dtype of ``update``."""
    out = update.new_empty(update.shape, dtype=update.dtype)
    _project(merged(update), basis, alpha, merged(out), compute_dtype(update, basis))
    return out


def apply_projected_update_(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float) -> None:
    """``weight += left @ projected(right)``; without ``left``, ``right`` is the update itself."""
    rows = merged(right)
    with written(weight) as matrices:
        if left is None:
            wide = compute_dtype(weight, right, basis)
            _project(rows, basis, alpha, matrices, wide, accumulate=True)
            return
        wide = compute_dtype(weight, left, right, basis)
        projected = rows.new_empty(rows.shape, dtype=wide)
        _project(rows, basis, alpha, projected, wide)
        _product(merged(left), projected, matrices, wide, accumulate=True)


def _project(
    update: Tensor, basis: Tensor, alpha: float, out: Tensor, wide: torch.dtype, accumulate: bool = False
) -> None:
    """``out = [out +] update - alpha (update U) U^T``, in ``wide``."""
    directions = repeated(basis, len(update))
    inner = update.new_empty(*update.shape[:2], basis.shape[-1], dtype=wide)
    _product(update, directions, inner, wide)
    _product(inner, directions.mT, out, wide, -alpha, update, accumulate)


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    wide: torch.dtype,
    factor: float = 1.0,
    addend: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """``out = [out +] [addend +] factor left right``, in ``wide``, rounded once to the dtype of ``out``."""
    cuda.launch(
        "product",
        out,
        view(left),
        view(right),
        None if addend is None else view(addend),
        view(out),
        factor,
        accumulate,
        wide == torch.float64,
        cuda.precision(out.device),
    )
