"""Energy of the pairs in a tile, from their inner products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphere_kernels._common.rows import Rows
from sphere_kernels._common.tiles import CLAMP, NEAR, Tile, recompute


def pair_values(rows: Rows, tile: Tile, gram: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every pair of a tile, fp64; zero for a row with itself.

    ``gram``: inner products of the unit rows, ``[matrices, rows, cols]`` fp32 or fp64.
    """
    values = _angular_values if distance == "angular" else _euclidean_values
    return tile.without_self(values(rows, tile, gram, s, half_space))


def antipode_values(rows: Rows, s: float, distance: str) -> Tensor:
    """Energy of every row with its own negative, ``[batch, n]`` fp64."""
    return riesz(antipode_square(rows, distance), s)


def riesz(square: Tensor, s: float) -> Tensor:
    """``f_s(t)`` from ``t^2``."""
    return square.log().mul_(-0.5) if s == 0 else square.pow(-0.5 * s)


def signs(half_space: bool) -> tuple[int, ...]:
    """Which of a row and its negative the columns stand for."""
    return (1, -1) if half_space else (1,)


def euclidean(rows: Rows, tile: Tile, gram: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Squared distances of rows to ``sign *`` columns, and which of them are near."""
    square = tile.outer_sum(rows.square).add_(gram, alpha=-2 * sign)
    near = tile.without_self(square < NEAR)
    recompute(square, near, sign, rows, tile, angular=False)
    return square.clamp_(min=CLAMP), near


def folded_angles(rows: Rows, tile: Tile, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angle of rows to the nearer of ``+`` and ``-`` column, whether that is ``-``, and which pairs are near."""
    flipped = gram < 0
    square = 2 - 2 * gram.abs().double()
    near = tile.without_self(square < NEAR)
    for sign in (1, -1):
        recompute(square, of_sign(near, flipped, sign), sign, rows, tile, angular=True)
    return angle(square.clamp_(min=0)), flipped, near


def angle(square: Tensor) -> Tensor:
    """``arccos(g)`` from ``2 - 2 g``."""
    return square.sqrt().mul_(0.5).asin_().mul_(2)


def of_sign(near: Tensor, flipped: Tensor, sign: int) -> Tensor:
    """The near pairs whose nearer column is ``sign *`` the column."""
    return near & (flipped if sign < 0 else ~flipped)


def antipode_square(rows: Rows, distance: str) -> Tensor:
    """Squared distance of every row to its own negative."""
    if distance == "angular":
        return (math.pi - angle(2 * rows.deficit)).square()
    return (4 * rows.square).clamp_(min=CLAMP)


def _euclidean_values(rows: Rows, tile: Tile, gram: Tensor, s: float, half_space: bool) -> Tensor:
    first, *second = (riesz(euclidean(rows, tile, gram, sign)[0], s) for sign in signs(half_space))
    return first + second[0] if second else first


def _angular_values(rows: Rows, tile: Tile, gram: Tensor, s: float, half_space: bool) -> Tensor:
    folded, flipped, _ = folded_angles(rows, tile, gram)
    full = torch.where(flipped, math.pi - folded, folded)
    values = riesz(full.square().clamp_(min=CLAMP), s)
    return values + riesz((math.pi - full).square().clamp_(min=CLAMP), s) if half_space else values
