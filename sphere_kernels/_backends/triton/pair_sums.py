"""Energies of rows from the sums of tiles, for weights and for Gram matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels._backends.triton import configs
from sphere_kernels._backends.triton.common import NORM
from sphere_kernels._backends.triton.launch import cdiv, launch
from sphere_kernels._backends.triton.near import near_energy_kernel
from sphere_kernels._backends.triton.pairs import energy_sum_kernel


def options(s: float, distance: str, half_space: bool) -> dict[str, Any]:
    """Definition of a pair's energy, as arguments of the kernels."""
    return {"S": s, "ANGULAR": distance == "angular", "HALF_SPACE": half_space}


def fast(s: float, distance: str, half_space: bool, dtype: torch.dtype) -> bool:
    """Whether a tile's energies are computed in fp32, as excess over a right angle's."""
    return distance == "euclidean" and not half_space and s in (1.0, 2.0) and dtype == torch.float32


def energies_of(
    partial: Tensor,
    row_data: Tensor,
    kind: dict[str, Any],
    quick: bool,
    block: int,
    weight: Tensor | None,
    gram: Tensor | None,
) -> Tensor:
    """Energies ``[batch, n]`` from the sums of tiles, after those with near pairs were computed anew."""
    batch, tiles, n = partial.shape
    strips = cdiv(n, configs.NEAR.block)
    rows = partial if weight is None else weight
    matrix = partial if gram is None else gram
    launch(
        near_energy_kernel,
        batch * strips * tiles,
        configs.NEAR,
        partial,
        p_weight=rows,
        p_gram=matrix,
        p_row_data=row_data,
        p_partial=partial,
        n=n,
        d=rows.shape[-1],
        strips=strips,
        tiles=tiles,
        plane=batch * n,
        stride_matrix=rows.stride(0),
        stride_row=rows.stride(1),
        stride_col=rows.stride(2),
        gram_matrix=matrix.stride(0),
        gram_row=matrix.stride(1),
        HAS_WEIGHT=weight is not None,
        FROM_GRAM=gram is not None,
        **kind,
        FAST=quick,
        BM=block,
        BR=configs.NEAR.block,
        BK=configs.NEAR.depth,
    )
    energy = partial.new_empty(batch, n)
    launch(
        energy_sum_kernel,
        cdiv(batch * n, configs.SUMS.block),
        configs.SUMS,
        partial,
        p_partial=partial,
        p_norm=row_data[NORM.value],
        p_energy=energy,
        total=batch * n,
        n=n,
        tiles=tiles,
        **kind,
        FAST=quick,
        BR=configs.SUMS.block,
    )
    return energy
