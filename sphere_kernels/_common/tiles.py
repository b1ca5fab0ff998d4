"""Square tiles over one triangle of the Gram matrix, and the exact distances of near-coincident pairs in a tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_kernels._common.rows import Rows

TILE_ROWS = 256
TILE_ELEMENTS = 1 << 20
NEAR = 1e-3  # squared distances below it are recomputed from differences of rows
CLAMP = 1e-12  # smallest squared distance: t >= 1e-6


@dataclass(frozen=True)
class Tile:
    """Pairs (row, column) of the matrices ``matrices`` of a batch."""

    matrices: slice
    rows: slice
    cols: slice

    @property
    def diagonal(self) -> bool:
        return self.rows == self.cols

    def gram(self, unit: Tensor) -> Tensor:
        """``[matrices, rows, cols]`` inner products, in the dtype of ``unit``."""
        return torch.bmm(unit[self.matrices, self.rows], unit[self.matrices, self.cols].mT)

    def outer_sum(self, values: Tensor) -> Tensor:
        """``values_i + values_j`` of ``[batch, n]`` values."""
        return values[self.matrices, self.rows].unsqueeze(-1) + values[self.matrices, self.cols].unsqueeze(-2)

    def add_sums(self, total: Tensor, pairs: Tensor) -> None:
        """Add a symmetric function of pairs to both of its rows in ``total [batch, n]``."""
        total[self.matrices, self.rows] += pairs.sum(-1)
        if not self.diagonal:
            total[self.matrices, self.cols] += pairs.sum(-2)

    def without_self(self, pairs: Tensor) -> Tensor:
        """``pairs`` with the pairs of a row with itself zeroed in place (False in a mask)."""
        if self.diagonal:
            pairs.diagonal(dim1=-2, dim2=-1).zero_()
        return pairs

    def symmetric(self, pairs: Tensor) -> Tensor:
        """``pairs`` with the upper triangle mirrored to the lower one where the tile holds both."""
        return pairs.triu() + pairs.triu(1).mT if self.diagonal else pairs

    def store(self, matrix: Tensor, pairs: Tensor) -> None:
        """Write a symmetric function of pairs to both sides of ``matrix [batch, n, n]``."""
        matrix[self.matrices, self.rows, self.cols] = pairs
        if not self.diagonal:
            matrix[self.matrices, self.cols, self.rows] = pairs.mT


def tiles(batch: int, n: int) -> Iterator[Tile]:
    """Tiles of equal size on and above the diagonal, many small matrices in one."""
    count = -(-n // TILE_ROWS)
    side = -(-n // count) if count else 1
    group = max(1, TILE_ELEMENTS // side**2)
    starts = range(0, n, side)
    for matrix in range(0, batch, group):
        for i in starts:
            for j in starts[i // side :]:
                matrices = slice(matrix, min(batch, matrix + group))
                yield Tile(matrices, slice(i, min(n, i + side)), slice(j, min(n, j + side)))


def mirror_(matrix: Tensor) -> None:
    """Copy the upper triangle of ``[..., n, n]``, contiguous, to the lower one."""
    matrices = matrix.view(-1, *matrix.shape[-2:])
    for tile in tiles(*matrices.shape[:2]):
        tile.store(matrices, tile.symmetric(matrices[tile.matrices, tile.rows, tile.cols]))


@dataclass(frozen=True)
class NearPairs:
    """The rows and columns of one matrix that have marked pairs in a tile, and those pairs ``mask [i, j]``."""

    matrix: int
    local: tuple[int, Tensor, Tensor]  # index into the tile
    rows: Tensor
    cols: Tensor
    mask: Tensor


def near_pairs(tile: Tile, mask: Tensor) -> Iterator[NearPairs]:
    """The marked pairs of a tile, matrix by matrix; they are rare, so the Python loop is short."""
    if not mask.any():
        return
    for k in mask.flatten(1).any(1).nonzero().flatten().tolist():
        i = mask[k].any(1).nonzero()
        j = mask[k].any(0).nonzero().flatten()
        yield NearPairs(
            tile.matrices.start + k, (k, i, j), tile.rows.start + i.flatten(), tile.cols.start + j, mask[k, i, j]
        )


def recompute(square: Tensor, mask: Tensor, sign: int, rows: Rows, tile: Tile, angular: bool) -> None:
    """Overwrite the marked squared distances between rows and ``sign *`` columns, in place, where the weight is known.

    ``angular`` asks for ``2 - 2 sign g`` instead: the squared distance plus the deficits of the two rows.
    """
    if rows.weight is None:
        return
    for pairs in near_pairs(tile, mask):
        k = pairs.matrix
        left, right = rows.exact(k, pairs.rows), sign * rows.exact(k, pairs.cols)
        exact = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()
        if angular:
            exact += rows.deficit[k, pairs.rows].unsqueeze(-1) + rows.deficit[k, pairs.cols]
        square[pairs.local] = torch.where(pairs.mask, exact, square[pairs.local])
