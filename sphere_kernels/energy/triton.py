"""Pair energy by the Triton kernels; imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton import configs
from sphere_kernels._backends.triton.launch import WIDE, Packed, cdiv, launch, product
from sphere_kernels._backends.triton.near import near_slopes_kernel
from sphere_kernels._backends.triton.pair_sums import energies_of, fast, options
from sphere_kernels._backends.triton.pairs import pair_energy_kernel
from sphere_kernels._backends.triton.rows import rows_gradient_kernel
from sphere_kernels._backends.triton.schedule import rectangle, triangle
from sphere_kernels._backends.triton.slopes import pair_slopes_kernel

GROUP = 2048  # rows whose slopes with as many others are in memory at a time
SLOPES = 1 << 23  # of all matrices that are computed at a time


def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every row, ``[..., n]`` fp64."""
    rows = gpu.merged(weight)
    batch, n, _ = rows.shape
    packed = Packed.of(rows, weight.dtype, normalize=True)
    kind = options(s, distance, half_space)
    quick = fast(s, distance, half_space, packed.plan.dtype)
    tile = "energy" if quick else "general"
    config = packed.plan.config(tile, n)
    tiles = cdiv(n, config.block)
    schedule = triangle(tiles, weight.device)
    partial = rows.new_empty(batch, tiles, n, dtype=torch.float64)
    launch(
        pair_energy_kernel,
        batch * len(schedule),
        config,
        rows,
        p_packed=packed.rows,
        p_row_data=packed.row_data,
        p_schedule=schedule,
        p_partial=partial,
        n=n,
        width=packed.rows.shape[-1],
        count=len(schedule),
        tiles=tiles,
        plane=batch * n,
        **kind,
        FAST=quick,
        PRECISION=packed.plan.precision(tile),
        WIDE=WIDE[packed.plan.dtype],
        BM=config.block,
        BK=config.depth,
    )
    return energies_of(partial, packed.row_data, kind, quick, config.block, rows, None).view(weight.shape[:-1])


def pair_energy_backward(grad: Tensor, weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Gradient of ``sum(grad * energy)`` for the weight, in its dtype."""
    rows = gpu.merged(weight)
    batch, n, d = rows.shape
    upstream = grad.double().resolve_neg().reshape(batch, n).contiguous()
    gradient = gpu.fresh(weight, (batch, n, d), weight.dtype)
    if gradient.numel():
        group = min(n, GROUP)
        step = max(1, SLOPES // group**2)
        for first in range(0, batch, step):
            part = slice(first, first + step)
            packed = Packed.of(rows[part], weight.dtype, normalize=True)
            _gradient(upstream[part], rows[part], packed, options(s, distance, half_space), gradient[part])
    return gradient.view(weight.shape).to(weight.dtype)


def _gradient(upstream: Tensor, rows: Tensor, packed: Packed, kind: dict[str, Any], gradient: Tensor) -> None:
    batch, n, d = rows.shape
    quick = fast(kind["S"], "angular" if kind["ANGULAR"] else "euclidean", kind["HALF_SPACE"], packed.plan.dtype)
    config = packed.plan.config("slopes" if quick else "general slopes", n)
    tiles = cdiv(n, config.block)
    partial = rows.new_empty(batch, tiles, n, dtype=torch.float64)
    pull = rows.new_zeros(batch, n, d, dtype=packed.plan.dtype)
    groups = [slice(start, min(n, start + GROUP)) for start in range(0, n, GROUP)]
    for k, these in enumerate(groups):
        for those in groups[k:]:
            both = _slopes(packed, upstream, these, those, kind, quick, config, partial)
            for slopes, a, b in ((both[0], these, those), (both[1], those, these))[: 1 if these == those else 2]:
                _pull_near(rows, upstream, packed, slopes, a, b, kind, config, partial, pull)
                product(
                    slopes,
                    packed.rows[:, b, :d],
                    pull[:, a],
                    scale=packed.scale[:, b],
                    accumulate=True,
                )
    launch(
        rows_gradient_kernel,
        cdiv(batch * n, configs.ROWS.block),
        configs.ROWS,
        rows,
        p_pull=pull,
        p_weight=rows,
        p_norm=packed.norm,
        p_partial=partial,
        p_upstream=upstream,
        p_out=gradient,
        total=batch * n,
        n=n,
        d=d,
        tiles=tiles,
        stride_matrix=rows.stride(0),
        stride_row=rows.stride(1),
        stride_col=rows.stride(2),
        **kind,
        BR=configs.ROWS.block,
        BK=configs.ROWS.depth,
    )


def _slopes(
    packed: Packed,
    upstream: Tensor,
    these: slice,
    those: slice,
    kind: dict[str, Any],
    quick: bool,
    config: configs.Config,
    partial: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slopes of some rows with others, ``[batch, rows, cols]``, and the same the other way round."""
    batch, tiles, n = partial.shape
    down, across = these.stop - these.start, those.stop - those.start
    slopes = packed.row_data.new_empty(batch, down, across, dtype=packed.plan.dtype)
    mirror = slopes if these == those else slopes.new_empty(batch, across, down)
    shape = cdiv(down, config.block), cdiv(across, config.block)
    schedule = triangle(shape[0], slopes.device) if these == those else rectangle(*shape, slopes.device)
    launch(
        pair_slopes_kernel,
        batch * len(schedule),
        config,
        slopes,
        p_packed=packed.rows,
        p_row_data=packed.row_data,
        p_upstream=upstream,
        p_schedule=schedule,
        p_partial=partial,
        p_slopes=slopes,
        p_mirror=mirror,
        n=n,
        width=packed.rows.shape[-1],
        count=len(schedule),
        tiles=tiles,
        plane=batch * n,
        first_row=these.start // config.block,
        first_col=those.start // config.block,
        rows=down,
        cols=across,
        **kind,
        FAST=quick,
        PRECISION=packed.plan.precision("slopes" if quick else "general slopes"),
        WIDE=WIDE[packed.plan.dtype],
        BM=config.block,
        BK=config.depth,
    )
    return slopes, mirror


def _pull_near(
    rows: Tensor,
    upstream: Tensor,
    packed: Packed,
    slopes: Tensor,
    these: slice,
    those: slice,
    kind: dict[str, Any],
    config: configs.Config,
    partial: Tensor,
    pull: Tensor,
) -> None:
    """Slopes anew, and pulls, of the rows of ``these`` that met near pairs among ``those``."""
    batch, tiles, n = partial.shape
    strips = cdiv(these.stop - these.start, configs.NEAR.block)
    launch(
        near_slopes_kernel,
        batch * strips,
        configs.NEAR,
        rows,
        p_weight=rows,
        p_upstream=upstream,
        p_row_data=packed.row_data,
        p_partial=partial,
        p_slopes=slopes,
        p_pull=pull,
        n=n,
        d=rows.shape[-1],
        strips=strips,
        rows=slopes.shape[1],
        cols=slopes.shape[2],
        tiles=tiles,
        plane=batch * n,
        first_row=these.start,
        first_tile=those.start // config.block,
        last_tile=cdiv(those.stop, config.block),
        stride_matrix=rows.stride(0),
        stride_row=rows.stride(1),
        stride_col=rows.stride(2),
        **kind,
        BM=config.block,
        BR=configs.NEAR.block,
        BK=configs.NEAR.depth,
    )
