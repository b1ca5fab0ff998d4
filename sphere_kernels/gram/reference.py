"""Gram matrices in plain torch: tile by tile over one triangle, mirrored to the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sphere_kernels._common.pairs import antipode_values, pair_values
from sphere_kernels._common.rows import Rows, UnitRows, compute_dtype, finite_or_nan, one_batch, scale
from sphere_kernels._common.tiles import Tile, tiles
from sphere_kernels.gram.update import update_terms


def gram(weight: Tensor, normalize: bool) -> Tensor:
    """``W W^T`` or that of the unit rows, ``[..., n, n]``."""
    rows = UnitRows.of(weight).unit if normalize else one_batch(weight).to(compute_dtype(weight))
    batch, n, _ = rows.shape
    product = rows.new_empty(batch, n, n)
    for tile in tiles(batch, n):
        tile.store(product, tile.symmetric(tile.gram(rows)))
    return product.reshape(*weight.shape[:-1], n)


def gram_gradient(grad: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """Gradient of ``sum(grad * gram)`` for the weight, in its dtype; zero for the unit row of a zero row."""
    wide, both = compute_dtype(weight), grad + grad.mT
    if not normalize:
        return (both @ weight.to(wide)).to(weight.dtype)
    rows = weight.double()
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / scale(norm)
    pull = (both @ unit.to(wide)).double()
    # (x - u (unit . x)) / (|w| + eps), u = w / |w|
    along = (unit * pull).sum(-1, keepdim=True)
    return ((pull - rows / norm * along) / scale(norm)).masked_fill(norm == 0, 0).to(weight.dtype)


def gram_energy(gram: Tensor, weight: Tensor | None, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every neuron, ``[..., n]`` fp64."""
    matrix = one_batch(gram)

    def kept(tile: Tile) -> Tensor:
        return tile.symmetric(matrix[tile.matrices, tile.rows, tile.cols])

    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return _energies(kept, diagonal, weight, s, distance, half_space).reshape(gram.shape[:-1])


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
    matrix = one_batch(gram)
    first, second, diagonal = update_terms(gram, left, cross, inner)

    def updated(tile: Tile) -> Tensor:
        m, i, j = tile.matrices, tile.rows, tile.cols
        block = tile.symmetric(torch.baddbmm(matrix[m, i, j], first[m, i], second[m, j].mT))
        if tile.diagonal:
            block.diagonal(dim1=-2, dim2=-1).copy_(diagonal[m, i])
        tile.store(matrix, block)
        return block

    energy = _energies(updated, diagonal, weight, s, distance, half_space)
    if matrix.data_ptr() != gram.data_ptr():
        gram.copy_(matrix.view_as(gram))  # leading dimensions that no view makes one
    return energy.reshape(gram.shape[:-1])


def _energies(
    block_of: Callable[[Tile], Tensor],
    diagonal: Tensor,
    weight: Tensor | None,
    s: float,
    distance: str,
    half_space: bool,
) -> Tensor:
    """Energy of every row, ``[batch, n]`` fp64, from the blocks of their inner products, each asked for once."""
    norm = finite_or_nan(diagonal.double()).clamp(min=0).sqrt()
    rows = Rows(None if weight is None else one_batch(weight), norm)
    inverse = scale(norm).reciprocal().masked_fill_(norm == 0, 0)
    energy = torch.zeros_like(norm)
    for tile in tiles(*energy.shape):
        m, i, j = tile.matrices, tile.rows, tile.cols
        unit = finite_or_nan(block_of(tile).double()) * inverse[m, i].unsqueeze(-1) * inverse[m, j].unsqueeze(-2)
        tile.add_sums(energy, pair_values(rows, tile, unit, s, distance, half_space))
    if half_space:
        energy += antipode_values(rows, s, distance)
    return energy + 0 * norm  # a lone NaN row has no pairs to poison
