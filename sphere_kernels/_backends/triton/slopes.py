"""The kernel of the pair energy's backward pass: slopes of a tile, for the product with the rows that follows."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import DEFICIT, SCALE, row_of, row_products, tile_of
from sphere_kernels._backends.triton.pairs import INFINITY, store_sums
from sphere_kernels._backends.triton.riesz import far_slopes, far_tile, near_of, right_angle_slope


@triton.jit
def tile_slopes(
    b_products,  # [BM, BM], WIDE
    p_row_data,  # [3, ...] fp64, at this matrix
    p_upstream,  # fp64, at this matrix
    plane,
    o_i,
    o_j,
    n,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Slopes in WIDE and radial parts of pairs ``i < j``: zero for what is no pair, zero and infinity for near ones."""
    m_pair = (o_i[:, None] < o_j[None, :]) & (o_j < n)[None, :]
    b_deficit_i = tl.load(row_of(p_row_data, DEFICIT, plane, o_i), mask=o_i < n, other=0.0)  # [BM]
    b_deficit_j = tl.load(row_of(p_row_data, DEFICIT, plane, o_j), mask=o_j < n, other=0.0)  # [BM]
    b_scale_i = tl.load(row_of(p_row_data, SCALE, plane, o_i), mask=o_i < n, other=0.0)  # [BM]
    b_scale_j = tl.load(row_of(p_row_data, SCALE, plane, o_j), mask=o_j < n, other=0.0)  # [BM]
    b_up_i = tl.load(p_upstream + o_i, mask=o_i < n, other=0.0)  # [BM]
    b_up_j = tl.load(p_upstream + o_j, mask=o_j < n, other=0.0)  # [BM]
    if FAST:
        b_g = (b_products * b_scale_i.to(WIDE)[:, None]) * b_scale_j.to(WIDE)[None, :]
        b_deficit = (0.5 * b_deficit_i).to(WIDE)[:, None] + (0.5 * b_deficit_j).to(WIDE)[None, :]
        _, _, b_half_square, m_near = far_tile(b_g, b_deficit)
        b_up = b_up_i.to(WIDE)[:, None] + b_up_j.to(WIDE)[None, :]
        b_bulk = right_angle_slope(b_half_square, S) * b_up
        b_radial = -b_bulk
    else:
        b_wide = (b_products.to(tl.float64) * (2.0 * b_scale_i)[:, None]) * b_scale_j[None, :]
        b_deficit = b_deficit_i[:, None] + b_deficit_j[None, :]
        b_minus = (2.0 - b_wide) - b_deficit
        b_plus = (2.0 + b_wide) - b_deficit
        m_near = near_of(b_minus, b_plus, b_deficit, ANGULAR, HALF_SPACE)
        b_bulk, b_radial = far_slopes(b_minus, b_plus, b_deficit, S, ANGULAR, HALF_SPACE)
        b_up = b_up_i[:, None] + b_up_j[None, :]
        b_bulk = b_bulk * b_up
        b_radial = b_radial * b_up
    b_bulk = tl.where(m_pair, tl.where(m_near, 0.0, b_bulk), 0.0)
    return b_bulk.to(WIDE), tl.where(m_pair, tl.where(m_near, INFINITY, b_radial), 0.0)


@triton.jit
def pair_slopes_kernel(
    p_packed,  # [batch, n, width]
    p_row_data,  # [3, batch, n] fp64
    p_upstream,  # [batch, n] fp64
    p_schedule,  # [count, 2], within the two groups of rows
    p_partial,  # [batch, tiles, n] fp64
    p_slopes,  # [batch, rows, cols]
    p_mirror,  # [batch, cols, rows]; the same where both groups are one
    n,
    width,
    count,
    tiles,
    plane,  # batch * n
    first_row,  # tile of the group
    first_col,
    rows,  # in the group
    cols,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Slopes of one tile of one matrix, written both ways, and the sums of their radial parts."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // count
    i_row, i_col, o_r, o_c = tile_of(p_schedule, i_program % count, BM)
    i_row += first_row
    i_col += first_col
    o_i = o_r + tl.cast(first_row, tl.int64) * BM
    o_j = o_c + tl.cast(first_col, tl.int64) * BM
    p_rows = p_packed + i_matrix * n * width
    b_products = row_products(p_rows, p_rows, o_i, o_j, n, width, PRECISION, WIDE, BM, BK)
    p_own = p_row_data + i_matrix * n
    p_up = p_upstream + i_matrix * n
    b_bulk, b_radial = tile_slopes(b_products, p_own, p_up, plane, o_i, o_j, n, S, ANGULAR, HALF_SPACE, FAST, WIDE)
    p_tile = p_slopes + i_matrix * rows * cols + o_r[:, None] * cols + o_c[None, :]
    tl.store(p_tile, b_bulk, mask=(o_r < rows)[:, None] & (o_c < cols)[None, :] & (o_i[:, None] <= o_j[None, :]))
    p_tile = p_mirror + i_matrix * rows * cols + o_c[:, None] * rows + o_r[None, :]
    m_tile = (o_c < cols)[:, None] & (o_r < rows)[None, :] & (o_i[None, :] < o_j[:, None])
    tl.store(p_tile, tl.trans(b_bulk), mask=m_tile)
    store_sums(p_partial + i_matrix * tiles * n, b_radial, i_row, i_col, o_i, o_j, n)
