"""The kernels of symmetric matrices: one triangle is computed and mirrored as it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import SCALE, finite_or_nan, row_of, row_products, tile_of
from sphere_kernels._backends.triton.pairs import store_sums, tile_energies


@triton.jit
def store_mirrored(p_out, stride, b_tile, o_i, o_j, n):
    """Write a tile's elements on and above the diagonal to both of their places."""
    b_tile = b_tile.to(p_out.dtype.element_ty)
    p_tile = p_out + o_i[:, None] * stride + o_j[None, :]
    tl.store(p_tile, b_tile, mask=(o_j < n)[None, :] & (o_i[:, None] <= o_j[None, :]))
    p_tile = p_out + o_j[:, None] * stride + o_i[None, :]
    tl.store(p_tile, tl.trans(b_tile), mask=(o_j < n)[:, None] & (o_i[None, :] < o_j[:, None]))


@triton.jit
def upper_tile(p_gram, stride, o_i, o_j, n):
    """A tile of a symmetric matrix on and above the diagonal; zeros below."""
    m_tile = (o_i[:, None] <= o_j[None, :]) & (o_j < n)[None, :]
    return tl.load(p_gram + o_i[:, None] * stride + o_j[None, :], mask=m_tile, other=0.0)


@triton.jit
def gram_kernel(
    p_packed,  # [batch, n, width]
    p_row_data,  # [3, batch, n] fp64; without NORMALIZE anything
    p_schedule,  # [count, 2]
    p_out,  # [batch, n, n], rows with a stride
    n,
    width,
    count,
    plane,  # batch * n
    out_matrix,
    out_row,
    NORMALIZE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of ``A A^T``, of that of the unit rows, or of ``out - A A^T``."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // count
    _, _, o_i, o_j = tile_of(p_schedule, i_program % count, BM)
    p_rows = p_packed + i_matrix * n * width
    b_tile = row_products(p_rows, p_rows, o_i, o_j, n, width, PRECISION, WIDE, BM, BK)
    if NORMALIZE:
        p_known = p_row_data + i_matrix * n
        b_scale_i = tl.load(row_of(p_known, SCALE, plane, o_i), mask=o_i < n, other=0.0).to(WIDE)  # [BM]
        b_scale_j = tl.load(row_of(p_known, SCALE, plane, o_j), mask=o_j < n, other=0.0).to(WIDE)  # [BM]
        b_tile = (b_tile * b_scale_i[:, None]) * b_scale_j[None, :]
    p_own = p_out + i_matrix * out_matrix
    if SUBTRACT:
        b_tile = upper_tile(p_own, out_row, o_i, o_j, n) - b_tile
    store_mirrored(p_own, out_row, b_tile, o_i, o_j, n)


@triton.jit
def gram_energy_kernel(
    p_gram,  # [batch, n, n], rows with a stride; the upper triangle is read
    p_row_data,  # [3, batch, n] fp64
    p_schedule,  # [count, 2]
    p_partial,  # [batch, tiles, n] fp64
    n,
    count,
    tiles,
    plane,  # batch * n
    gram_matrix,
    gram_row,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
):
    """The sums of the energies of one tile's pairs, from their inner products."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // count
    i_row, i_col, o_i, o_j = tile_of(p_schedule, i_program % count, BM)
    b_tile = finite_or_nan(upper_tile(p_gram + i_matrix * gram_matrix, gram_row, o_i, o_j, n))  # [BM, BM]
    p_own = p_row_data + i_matrix * n
    b_value = tile_energies(b_tile, p_own, plane, o_i, o_j, n, S, ANGULAR, HALF_SPACE, FAST, WIDE)
    store_sums(p_partial + i_matrix * tiles * n, b_value, i_row, i_col, o_i, o_j, n)


@triton.jit
def gram_update_kernel(
    p_first,  # [batch, n, width]
    p_second,  # [batch, n, width]
    p_diagonal,  # [batch, n], of the result
    p_row_data,  # [3, batch, n] fp64, of the result
    p_schedule,  # [count, 2]
    p_gram,  # [batch, n, n], rows with a stride; the upper triangle is read
    p_partial,  # [batch, tiles, n] fp64
    n,
    width,
    count,
    tiles,
    plane,  # batch * n
    gram_matrix,
    gram_row,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of ``gram + first second^T``, written to both of its places, and the sums of its pairs' energies."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // count
    i_row, i_col, o_i, o_j = tile_of(p_schedule, i_program % count, BM)
    p_a = p_first + i_matrix * n * width
    p_b = p_second + i_matrix * n * width
    b_tile = row_products(p_a, p_b, o_i, o_j, n, width, PRECISION, WIDE, BM, BK)
    p_own = p_gram + i_matrix * gram_matrix
    b_tile += upper_tile(p_own, gram_row, o_i, o_j, n)  # [BM, BM]
    b_diagonal = tl.load(p_diagonal + i_matrix * n + o_i, mask=o_i < n, other=0.0)  # [BM]
    b_tile = tl.where(o_i[:, None] == o_j[None, :], b_diagonal[:, None], b_tile)
    store_mirrored(p_own, gram_row, b_tile, o_i, o_j, n)
    b_value = tile_energies(
        finite_or_nan(b_tile), p_row_data + i_matrix * n, plane, o_i, o_j, n, S, ANGULAR, HALF_SPACE, FAST, WIDE
    )
    store_sums(p_partial + i_matrix * tiles * n, b_value, i_row, i_col, o_i, o_j, n)
