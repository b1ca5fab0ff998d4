"""Pair energy in plain torch: tile by tile over one triangle, fp64 sums, near-coincident pairs from differences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphere_kernels._common.pairs import (
    angle,
    antipode_square,
    antipode_values,
    euclidean,
    folded_angles,
    of_sign,
    pair_values,
    riesz,
    signs,
)
from sphere_kernels._common.rows import EPSILON, UnitRows, row_chunks
from sphere_kernels._common.tiles import CLAMP, Tile, near_pairs, tiles


def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every row, ``[..., n]`` fp64."""
    rows = UnitRows.of(weight)
    batch, n, _ = rows.weight.shape
    energy = weight.new_zeros(batch, n, dtype=torch.float64)
    for tile in tiles(batch, n):
        tile.add_sums(energy, pair_values(rows, tile, tile.gram(rows.unit), s, distance, half_space))
    if half_space:
        energy += antipode_values(rows, s, distance)
    return (energy + 0 * rows.norm).reshape(weight.shape[:-1])  # a lone NaN row has no pairs to poison


def pair_energy_backward(grad: Tensor, weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Gradient of ``sum(grad * energy)`` for the weight, in its dtype.

    The gradient for the unit rows is kept in two parts, ``pull + radial * unit``: the normalisation removes all but
    1e-8 of the radial part, so that part stays a number per row and never rounds into the other.
    """
    rows = UnitRows.of(weight)
    grad = grad.reshape(rows.norm.shape).double()
    pull, radial = torch.zeros_like(rows.unit), torch.zeros_like(rows.norm)
    for tile in tiles(*rows.norm.shape):
        slopes = _angular_slopes if distance == "angular" else _euclidean_slopes
        slopes(rows, tile, s, half_space, tile.outer_sum(grad), pull, radial)
    if half_space:
        radial += grad * _antipode_slope(rows, s, distance)
    return _through_normalisation(rows, pull, radial).reshape(weight.shape)


def _riesz_slope(square: Tensor, s: float) -> Tensor:
    """``-f_s'(t) / t`` from ``t^2``; zero where the distance is clamped."""
    slope = square.reciprocal() if s == 0 else riesz(square, s).div_(square).mul_(s)
    return slope.masked_fill_(square <= CLAMP, 0)


def _euclidean_slopes(
    rows: UnitRows, tile: Tile, s: float, half_space: bool, weights: Tensor, pull: Tensor, radial: Tensor
) -> None:
    # d/d(unit_i) of the energy of a pair: slope * weight * (sign * unit_j - unit_i)
    gram = tile.gram(rows.unit)
    bulk = torch.zeros_like(weights)
    for sign in signs(half_space):
        square, near = euclidean(rows, tile, gram, sign)
        slope = tile.without_self(_riesz_slope(square, s).mul_(weights))
        _pull_near(rows, tile, slope, near, sign, pull)
        slope.masked_fill_(near, 0)
        tile.add_sums(radial, -slope)
        bulk.add_(slope, alpha=sign)
    _pull_bulk(rows, tile, bulk, pull)


def _angular_slopes(
    rows: UnitRows, tile: Tile, s: float, half_space: bool, weights: Tensor, pull: Tensor, radial: Tensor
) -> None:
    # d/d(unit_i) of the energy of a pair: slope * weight * unit_j, where slope = d f(arccos g) / dg
    folded, flipped, near = folded_angles(rows, tile, tile.gram(rows.unit))
    full = torch.where(flipped, math.pi - folded, folded)
    slope = full * _riesz_slope(full.square(), s)
    if half_space:
        opposite = math.pi - full
        slope -= opposite * _riesz_slope(opposite.square(), s)
    slope.div_(folded.sin()).masked_fill_(folded.square() <= CLAMP, 0)
    tile.without_self(slope.mul_(weights))
    for sign in (1, -1):
        # slope * unit_j = sign * slope * (sign * unit_j - unit_i) + sign * slope * unit_i
        marked = of_sign(near, flipped, sign)
        _pull_near(rows, tile, sign * slope, marked, sign, pull)
        tile.add_sums(radial, sign * slope.masked_fill(~marked, 0))
    _pull_bulk(rows, tile, slope.masked_fill_(near, 0), pull)


def _pull_bulk(rows: UnitRows, tile: Tile, slope: Tensor, pull: Tensor) -> None:
    """Add ``slope @ unit`` to the rows and its transpose to the columns."""
    slope = slope.to(rows.unit.dtype)
    pull[tile.matrices, tile.rows] += slope @ rows.unit[tile.matrices, tile.cols]
    if not tile.diagonal:
        pull[tile.matrices, tile.cols] += slope.mT @ rows.unit[tile.matrices, tile.rows]


def _pull_near(rows: UnitRows, tile: Tile, slope: Tensor, mask: Tensor, sign: int, pull: Tensor) -> None:
    """Add ``sum_j slope_ij (sign * unit_j - unit_i)`` over the marked pairs, in fp64."""
    for pairs in near_pairs(tile, mask):
        k = pairs.matrix
        left, right = rows.exact(k, pairs.rows), rows.exact(k, pairs.cols)
        marked = slope[pairs.local].masked_fill(~pairs.mask, 0)
        pull[k, pairs.rows] += _differences(marked, left, sign * right).to(pull.dtype)
        if not tile.diagonal:
            pull[k, pairs.cols] += _differences(marked.mT, right, sign * left).to(pull.dtype)


def _differences(slope: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum_j slope_ij (right_j - left_i)``, centred on one row so that what cancels is small."""
    centre = left[:1]
    return slope @ (right - centre) - slope.sum(1, keepdim=True) * (left - centre)


def _antipode_slope(rows: UnitRows, s: float, distance: str) -> Tensor:
    """Coefficient of the unit row in the gradient of the energy between a row and its own negative."""
    slope = _riesz_slope(antipode_square(rows, distance), s)
    if distance == "euclidean":
        return -4 * slope
    short = angle(2 * rows.deficit)
    return -2 * slope * (math.pi - short) / short.sin()


def _through_normalisation(rows: UnitRows, pull: Tensor, radial: Tensor) -> Tensor:
    """``(x - u (unit . x)) / (|w| + eps)``, ``x = pull + radial * unit``, ``u = w / |w|``; zero for a zero row."""
    scale = rows.norm + EPSILON
    kept = radial * rows.norm * EPSILON / scale.square()  # of the radial part: k - k^2 for k = |w| / scale
    grad = torch.empty_like(rows.weight, memory_format=torch.contiguous_format)
    batch, n, d = grad.shape
    for chunk in row_chunks(n, batch * d):
        row, x = rows.weight[:, chunk].double() / rows.norm[:, chunk, None], pull[:, chunk].double()
        along = (row * x).sum(-1) * (rows.norm / scale)[:, chunk] - kept[:, chunk]
        x -= row * along.unsqueeze(-1)
        x /= scale[:, chunk, None]
        grad[:, chunk] = x.masked_fill_(rows.norm[:, chunk, None] == 0, 0)
    return grad
