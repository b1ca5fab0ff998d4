"""Sparse projection by the compiled CPU kernels: products that read and write each of the four dtypes in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels import native
from sphere_kernels.dispatch import register
from sphere_kernels.rows import compute_dtype


@register("sparse_projection", "native", native.supports)
def sparse_projection(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """``update - alpha (update U) U^T``, rounded once to the dtype of ``update``."""
    out = torch.empty(update.shape, dtype=update.dtype)
    _project(native.merged(update), _one_each(basis, update), alpha, native.merged(out))
    return out


@register("apply_projected_update_", "native", native.supports)
def apply_projected_update_(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float) -> None:
    """``weight += left @ projected(right)``; without ``left``, ``right`` is the update itself."""
    columns, rows = _one_each(basis, weight), native.merged(right)
    with native.written(weight) as matrices:
        if left is None:
            _project(rows, columns, alpha, matrices, accumulate=True)
            return
        projected = torch.empty(rows.shape, dtype=compute_dtype(weight, left, right, basis))
        _project(rows, columns, alpha, projected)
        _product(native.merged(left), projected, matrices, accumulate=True)


def _one_each(basis: Tensor, matrices: Tensor) -> Tensor:
    """The basis once per matrix, without copies of a shared one."""
    return native.merged(basis) if basis.ndim > 2 else basis.expand(matrices.shape[:-2].numel(), *basis.shape)


def _project(update: Tensor, basis: Tensor, alpha: float, out: Tensor, accumulate: bool = False) -> None:
    """``out = (accumulate ? out : 0) + update - alpha (update U) U^T``."""
    part = update.new_empty(*update.shape[:-1], basis.shape[-1], dtype=compute_dtype(update, basis, out))
    _product(update, basis, part)
    _product(part, basis.mT, out, -alpha, update, accumulate)


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    factor: float = 1.0,
    addend: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """``out = (accumulate ? out : 0) + addend + factor left right``; every tensor ``[count, rows, cols]``."""
    native.cpu.product(
        native.view(left),
        native.view(right),
        factor,
        native.view(out),
        None if addend is None else native.view(addend),
        accumulate,
        compute_dtype(left, right, out) == torch.float64,
        *native.tier_and_threads(),
    )
