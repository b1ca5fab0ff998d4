"""The kernels of the pair energy's forward pass: energies of a tile, and the sum over tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import DEFICIT, SCALE, row_of, row_products, tile_of
from sphere_kernels._backends.triton.riesz import antipode_square, excess, far_tile, near_of, pair_value, riesz_value

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def tile_energies(
    b_products,  # [BM, BM], WIDE
    p_row_data,  # [3, ...] fp64, at this matrix
    plane,  # from one of the three to the next
    o_i,
    o_j,
    n,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Energies of a tile's pairs ``i < j``, infinite for near ones; zero for what is no pair. FAST: see `excess`."""
    m_pair = (o_i[:, None] < o_j[None, :]) & (o_j < n)[None, :]
    b_deficit_i = tl.load(row_of(p_row_data, DEFICIT, plane, o_i), mask=o_i < n, other=0.0)  # [BM]
    b_deficit_j = tl.load(row_of(p_row_data, DEFICIT, plane, o_j), mask=o_j < n, other=0.0)  # [BM]
    b_scale_i = tl.load(row_of(p_row_data, SCALE, plane, o_i), mask=o_i < n, other=0.0)  # [BM]
    b_scale_j = tl.load(row_of(p_row_data, SCALE, plane, o_j), mask=o_j < n, other=0.0)  # [BM]
    if FAST:
        b_g = (b_products * b_scale_i.to(WIDE)[:, None]) * b_scale_j.to(WIDE)[None, :]
        b_deficit = (0.5 * b_deficit_i).to(WIDE)[:, None] + (0.5 * b_deficit_j).to(WIDE)[None, :]
        b_u, b_rest, b_half_square, m_near = far_tile(b_g, b_deficit)
        b_value = excess(b_u, b_rest, b_half_square, S)
    else:
        b_wide = (b_products.to(tl.float64) * (2.0 * b_scale_i)[:, None]) * b_scale_j[None, :]
        b_deficit = b_deficit_i[:, None] + b_deficit_j[None, :]
        b_minus = (2.0 - b_wide) - b_deficit
        b_plus = (2.0 + b_wide) - b_deficit
        m_near = near_of(b_minus, b_plus, b_deficit, ANGULAR, HALF_SPACE)
        b_value = pair_value(b_minus, b_plus, b_deficit, S, ANGULAR, HALF_SPACE)
    return tl.where(m_pair, tl.where(m_near, INFINITY, b_value), 0.0)


@triton.jit
def store_sums(p_partial, b_value, i_row, i_col, o_i, o_j, n):
    """Sums of pairs ``i < j`` for both of their rows, each in the place of its tile."""
    b_rows = tl.sum(b_value, 1).to(tl.float64)
    b_cols = tl.sum(b_value, 0).to(tl.float64)
    if i_row == i_col:
        tl.store(p_partial + i_col * n + o_i, b_rows + b_cols, mask=o_i < n)
    else:
        tl.store(p_partial + i_col * n + o_i, b_rows, mask=o_i < n)
        tl.store(p_partial + i_row * n + o_j, b_cols, mask=o_j < n)


@triton.jit
def pair_energy_kernel(
    p_packed,  # [batch, n, width]
    p_row_data,  # [3, batch, n] fp64
    p_schedule,  # [count, 2]
    p_partial,  # [batch, tiles, n] fp64
    n,
    width,
    count,
    tiles,
    plane,  # batch * n
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Sums of the energies in one tile of one matrix."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // count
    i_row, i_col, o_i, o_j = tile_of(p_schedule, i_program % count, BM)
    p_rows = p_packed + i_matrix * n * width
    b_products = row_products(p_rows, p_rows, o_i, o_j, n, width, PRECISION, WIDE, BM, BK)
    p_own = p_row_data + i_matrix * n
    b_value = tile_energies(b_products, p_own, plane, o_i, o_j, n, S, ANGULAR, HALF_SPACE, FAST, WIDE)
    store_sums(p_partial + i_matrix * tiles * n, b_value, i_row, i_col, o_i, o_j, n)


@triton.jit
def energy_sum_kernel(
    p_partial,  # [batch, tiles, n] fp64
    p_norm,  # [batch * n] fp64
    p_energy,  # [batch * n] fp64
    total,
    n,
    tiles,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    BR: tl.constexpr,
):
    """Energy of every row: its sums over the tiles, one after the other, and the row with its own negative."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < total
    b_norm = tl.load(p_norm + o_r, mask=m_r, other=0.0)  # [BR]
    b_sum = tl.zeros((BR,), tl.float64)
    for t in range(0, tiles):
        b_sum += tl.load(p_partial + ((o_r // n) * tiles + t) * n + o_r % n, mask=m_r, other=0.0)
    if FAST:
        b_sum = (b_sum + (n - 1)) * riesz_value(tl.full((BR,), 2.0, tl.float64), S)
    if HALF_SPACE:
        b_sum += riesz_value(antipode_square(b_norm, ANGULAR), S)
    tl.store(p_energy + o_r, b_sum + 0.0 * b_norm, mask=m_r)  # a lone NaN row has no pairs to poison
