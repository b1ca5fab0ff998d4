"""Sparse projection by the compiled CPU kernels: products that read and write each of the four dtypes in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import native


def sparse_projection(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """``update - alpha (update U) U^T``, rounded once to the dtype of ``update``."""
    out = update.new_empty(update.shape, dtype=update.dtype)
    _project(update, basis, alpha, None, native.merged(out))
    return out


def apply_projected_update_(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float) -> None:
    """``weight += left @ projected(right)``; without ``left``, ``right`` is the update itself."""
    with native.written(weight) as matrices:
        _project(right, basis, alpha, left, matrices, accumulate=True)


def _project(
    update: Tensor, basis: Tensor, alpha: float, left: Tensor | None, out: Tensor, accumulate: bool = False
) -> None:
    """``out = (accumulate ? out : 0) + left (update - alpha (update U) U^T)`` for ``out [count, n, d]``."""
    update, factor = native.merged(update), None if left is None else native.merged(left)
    basis = native.repeated(basis, len(update))
    native.cpu.project(
        native.view(update),
        native.view(basis),
        alpha,
        None if factor is None else native.view(factor),
        native.view(out),
        accumulate,
        torch.float64 in (update.dtype, basis.dtype, out.dtype, None if factor is None else factor.dtype),
        *native.tier_and_threads(),
    )
