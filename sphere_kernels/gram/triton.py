"""Gram matrices by the Triton kernels; imported at the first call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton.configs import Config
from sphere_kernels._backends.triton.gram import gram_energy_kernel, gram_update_kernel
from sphere_kernels._backends.triton.launch import WIDE, Packed, Plan, cdiv, gram, launch
from sphere_kernels._backends.triton.pair_sums import energies_of, fast, options
from sphere_kernels._backends.triton.schedule import triangle
from sphere_kernels._common.rows import EPSILON, finite_or_nan
from sphere_kernels.gram.update import update_terms

__all__ = ["gram", "gram_energy", "gram_update_energy_"]


def gram_energy(gram: Tensor, weight: Tensor | None, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every neuron, ``[..., n]`` fp64."""
    matrix = gpu.merged(gram)
    if matrix.stride(-1) != 1:
        matrix = matrix.contiguous()
    tiles = _Tiles.of(matrix, matrix.diagonal(dim1=-2, dim2=-1), s, distance, half_space)
    launch(gram_energy_kernel, tiles.programs, tiles.config, matrix, p_gram=matrix, **tiles.arguments(matrix))
    return tiles.energies(matrix, weight).view(gram.shape[:-1])


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
        # Both sides ready for products; at least one column, so that an update of rank 0 passes through them too.
        a, b = (Packed.of(side, gram.dtype, normalize=False).rows for side in (first, second))
        tiles = _Tiles.of(matrix, diagonal, s, distance, half_space)
        launch(
            gram_update_kernel,
            tiles.programs,
            tiles.config,
            matrix,
            p_first=a,
            p_second=b,
            p_diagonal=diagonal,
            p_gram=matrix,
            width=a.shape[-1],
            **tiles.arguments(matrix),
            PRECISION=tiles.plan.precision(tiles.kind),
            BK=tiles.config.depth,
        )
        return tiles.energies(matrix, weight).view(gram.shape[:-1])


@dataclass(frozen=True)
class _Tiles:
    """How the energies of Gram matrices ``[batch, n, n]`` are summed: tile by tile, then over the tiles.

    Attributes:
        plan, kind, config: of the kernel.
        energy: what defines the energy of a pair, see `options`.
        fast: see `sphere_kernels._backends.triton.pair_sums.fast`.
        schedule: ``[count, 2]``.
        row_data: ``[3, batch, n]`` fp64, see `Packed`.
        partial: ``[batch, tiles, n]`` fp64, the sums.
    """

    plan: Plan
    kind: str
    config: Config
    energy: dict[str, Any]
    fast: bool
    schedule: Tensor
    row_data: Tensor
    partial: Tensor

    @classmethod
    def of(cls, matrix: Tensor, diagonal: Tensor, s: float, distance: str, half_space: bool) -> _Tiles:
        batch, n, _ = matrix.shape
        plan, quick = Plan.of(matrix.device, matrix.dtype), fast(s, distance, half_space, matrix.dtype)
        kind = "update" if quick else "general"
        config = plan.config(kind, n)
        tiles, row_data = cdiv(n, config.block), _row_data(diagonal)
        partial = row_data.new_empty(batch, tiles, n)
        schedule = triangle(tiles, matrix.device)
        return cls(plan, kind, config, options(s, distance, half_space), quick, schedule, row_data, partial)

    @property
    def programs(self) -> int:
        return len(self.partial) * len(self.schedule)

    def arguments(self, matrix: Tensor) -> dict[str, Any]:
        """The arguments that both kernels of tiles take."""
        batch, tiles, n = self.partial.shape
        return {
            "p_row_data": self.row_data,
            "p_schedule": self.schedule,
            "p_partial": self.partial,
            "n": n,
            "count": len(self.schedule),
            "tiles": tiles,
            "plane": batch * n,
            "gram_matrix": matrix.stride(0),
            "gram_row": matrix.stride(1),
            **self.energy,
            "FAST": self.fast,
            "WIDE": WIDE[self.plan.dtype],
            "BM": self.config.block,
        }

    def energies(self, matrix: Tensor, weight: Tensor | None) -> Tensor:
        """Energies ``[batch, n]``, near pairs from the weight where there is one."""
        rows = None if weight is None else gpu.merged(weight)
        return energies_of(self.partial, self.row_data, self.energy, self.fast, self.config.block, rows, matrix)


def _row_data(diagonal: Tensor) -> Tensor:
    """Of rows with these squared norms ``[batch, n]``: norms, deficits, scales, see `Packed`; fp64."""
    norm = finite_or_nan(diagonal.double()).clamp(min=0).sqrt()
    length = norm + EPSILON
    deficit = EPSILON * (norm + length) / length.square()
    # What rounding left of the inner products of a zero row is no direction.
    return torch.stack([norm, deficit, length.reciprocal().masked_fill_(norm == 0, 0)])
