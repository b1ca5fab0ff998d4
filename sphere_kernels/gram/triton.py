"""Gram matrices by the Triton kernels; imported at the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels import gpu
from sphere_kernels.energy.triton import energies_of, fast, options
from sphere_kernels.gram.update import update_terms
from sphere_kernels.rows import EPSILON, compute_dtype, finite_or_nan
from sphere_kernels.triton_kernels.gram import gram_update_kernel
from sphere_kernels.triton_kernels.launch import WIDE, Packed, Plan, cdiv, launch, symmetric_product
from sphere_kernels.triton_kernels.schedule import triangle


def gram(weight: Tensor, normalize: bool) -> Tensor:
    """Inner products of the rows of ``[..., n, d]`` or of its unit rows, ``[..., n, n]``."""
    rows = gpu.merged(weight)
    batch, n, _ = rows.shape
    out = rows.new_empty(batch, n, n, dtype=compute_dtype(weight))
    symmetric_product(Packed.of(rows, weight.dtype, normalize), out, normalize=normalize)
    return out.view(*weight.shape[:-1], n)


def gram_update_energy_(
    gram: Tensor,
    left: Tensor,
    cross: Tensor,
    inner: Tensor,
    weight: Tensor | None,
    s: float,
    distance: str,
    half_space: bool,
) -> Tensor:
    """Update ``gram`` in place; the energy of every neuron, ``[..., n]`` fp64."""
    first, second, diagonal = update_terms(gram, left, cross, inner)
    with gpu.written(gram, contiguous=gram.stride(-1) != 1) as matrix:
        batch, n, _ = matrix.shape
        # Both sides ready for products; at least one column, so that an update of rank 0 passes through them too.
        a, b = (Packed.of(side, gram.dtype, normalize=False).rows for side in (first, second))
        plan = Plan.of(gram.device, gram.dtype)
        kind, quick = options(s, distance, half_space), fast(s, distance, half_space, gram.dtype)
        tile = "update" if quick else "general"
        config = plan.config(tile, n)
        tiles, norm = cdiv(n, config.block), _row_data(diagonal)
        schedule = triangle(tiles, gram.device)
        partial = norm.new_empty(batch, tiles, n)
        launch(
            gram_update_kernel,
            batch * len(schedule),
            config,
            matrix,
            p_first=a,
            p_second=b,
            p_diagonal=diagonal,
            p_norm=norm,
            p_schedule=schedule,
            p_gram=matrix,
            p_partial=partial,
            n=n,
            width=a.shape[-1],
            count=len(schedule),
            tiles=tiles,
            plane=batch * n,
            gram_matrix=matrix.stride(0),
            gram_row=matrix.stride(1),
            **kind,
            FAST=quick,
            PRECISION=plan.precision(tile),
            WIDE=WIDE[plan.dtype],
            BM=config.block,
            BK=config.depth,
        )
        rows = None if weight is None else gpu.merged(weight)
        energy = energies_of(partial, norm, kind, quick, config.block, rows, matrix)
    return energy.view(gram.shape[:-1])


def _row_data(diagonal: Tensor) -> Tensor:
    """Of rows with these squared norms ``[batch, n]``: norms, what their squares lack to 1, factors; fp64."""
    norm = finite_or_nan(diagonal.double()).clamp(min=0).sqrt()
    length = norm + EPSILON
    lack = EPSILON * (norm + length) / length.square()
    # What rounding left of the inner products of a zero row is no direction.
    return torch.stack([norm, lack, length.reciprocal().masked_fill_(norm == 0, 0)])
