"""Sparse projection in plain torch: two thin products, never a d x d matrix."""

from __future__ import annotations

from torch import Tensor

from sphere_kernels._common.rows import compute_dtype, row_chunks


def _project(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    return ((update @ basis) @ basis.mT).mul_(-alpha).add_(update)


def sparse_projection(update: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """``update - alpha (update U) U^T``, rounded once to the dtype of ``update``."""
    wide = compute_dtype(update, basis)
    projected = _project(update.to(wide), basis.to(wide), alpha)
    return projected.to(update.dtype).contiguous()  # as the fake promises; matmul's result already is


def apply_projected_update_(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float) -> None:
    """``weight += left @ projected(right)`` in chunks of rows; without ``left``, ``right`` is the update itself."""
    wide = compute_dtype(weight, right, basis) if left is None else compute_dtype(weight, left, right, basis)
    basis = basis.to(wide)
    if left is not None:
        right = _project(right.to(wide), basis, alpha)
    n, d = weight.shape[-2:]
    for chunk in row_chunks(n, weight.shape[:-2].numel() * d):
        rows = weight[..., chunk, :]
        if left is None:
            update = _project(right[..., chunk, :].to(wide), basis, alpha)
        else:
            update = left[..., chunk, :].to(wide) @ right
        rows.copy_(update.add_(rows))
