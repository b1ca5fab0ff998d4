"""Near pairs: rows that have some in a tile get that tile's sums anew, from differences of the rows in fp64.

The kernels of the tiles leave an infinite sum where a row met a near pair. That is rare, so what reads it usually ends
there; where it is not, it costs about n^2 d operations in fp64 without tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import DEFICIT, EPSILON, SCALE, finite_or_nan, row_of
from sphere_kernels._backends.triton.pairs import INFINITY
from sphere_kernels._backends.triton.riesz import NEAR, near_slopes, pair_value, riesz_value


@triton.jit
def lengths(p_weight, o_i, n, d, stride_row, stride_col, BR: tl.constexpr, BK: tl.constexpr):
    """``|w| + eps`` of rows of ``[n, d]``; NaN where it overflows."""
    o_k = tl.arange(0, BK).to(tl.int64)
    b_square = tl.zeros((BR,), tl.float64)
    for k in tl.range(0, d, BK, num_stages=1):
        m_x = (o_i < n)[:, None] & (o_k < d - k)[None, :]
        p_x = p_weight + (o_i * stride_row)[:, None] + ((k + o_k) * stride_col)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
        b_square += tl.sum(b_x * b_x, 1)
    return finite_or_nan(tl.sqrt(b_square)) + EPSILON


@triton.jit
def exact_squares(
    p_weight, o_i, o_j, b_length_i, n, d, stride_row, stride_col, BOTH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    """``|unit_i - unit_j|^2`` and, for BOTH, ``|unit_i + unit_j|^2`` of rows of ``[n, d]``; the lengths of rows j."""
    b_length_j = lengths(p_weight, o_j, n, d, stride_row, stride_col, BR, BK)
    o_k = tl.arange(0, BK).to(tl.int64)
    b_minus = tl.zeros((BR, BR), tl.float64)
    b_plus = tl.zeros((BR, BR), tl.float64)
    for k in tl.range(0, d, BK, num_stages=1):
        m_k = o_k < d - k
        p_k = p_weight + ((k + o_k) * stride_col)[None, :]
        b_a = tl.load(p_k + (o_i * stride_row)[:, None], mask=(o_i < n)[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        b_b = tl.load(p_k + (o_j * stride_row)[:, None], mask=(o_j < n)[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        b_a = (b_a.to(tl.float64) / b_length_i[:, None])[:, None, :]
        b_b = (b_b.to(tl.float64) / b_length_j[:, None])[None, :, :]
        b_minus += tl.sum((b_a - b_b) * (b_a - b_b), 2)
        if BOTH:
            b_plus += tl.sum((b_a + b_b) * (b_a + b_b), 2)
    return b_minus, b_plus, b_length_j


@triton.jit
def squares_of_gram(p_gram, p_row_data, plane, o_i, o_j, n, stride):
    """The same squares from inner products of rows, and the pair's deficit; fp64."""
    m_pair = (o_i < n)[:, None] & (o_j < n)[None, :]
    b_m = tl.load(p_gram + o_i[:, None] * stride + o_j[None, :], mask=m_pair, other=0.0).to(tl.float64)  # [BR, BR]
    b_scale_i = tl.load(row_of(p_row_data, SCALE, plane, o_i), mask=o_i < n, other=0.0)  # [BR]
    b_scale_j = tl.load(row_of(p_row_data, SCALE, plane, o_j), mask=o_j < n, other=0.0)  # [BR]
    b_g = 2.0 * finite_or_nan(b_m) * b_scale_i[:, None] * b_scale_j[None, :]
    b_deficit_i = tl.load(row_of(p_row_data, DEFICIT, plane, o_i), mask=o_i < n, other=0.0)  # [BR]
    b_deficit_j = tl.load(row_of(p_row_data, DEFICIT, plane, o_j), mask=o_j < n, other=0.0)  # [BR]
    b_deficit = b_deficit_i[:, None] + b_deficit_j[None, :]
    return (2.0 - b_g) - b_deficit, (2.0 + b_g) - b_deficit, b_deficit


@triton.jit
def is_near(b_square, b_deficit, ANGULAR: tl.constexpr):
    """Whether a row and the other one, or its negative, are near; in terms of angles their lengths are 1."""
    if ANGULAR:
        return b_square + b_deficit < NEAR
    else:
        return b_square < NEAR


@triton.jit
def near_energy_kernel(
    p_weight,  # [batch, n, d] of any strides
    p_gram,  # [batch, n, n], inner products; without FROM_GRAM anything
    p_row_data,  # [3, batch, n] fp64
    p_partial,  # [batch, tiles, n] fp64
    n,
    d,
    strips,  # of BR rows
    tiles,
    plane,
    stride_matrix,
    stride_row,
    stride_col,
    gram_matrix,
    gram_row,
    HAS_WEIGHT: tl.constexpr,
    FROM_GRAM: tl.constexpr,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """The sums of one strip of rows over one tile's columns, if a row of the strip met a near pair there."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // (strips * tiles)
    i_strip = i_program // tiles % strips
    i_tile = i_program % tiles
    o_i = i_strip * BR + tl.arange(0, BR)
    p_sums = p_partial + (i_matrix * tiles + i_tile) * n + o_i
    b_old = tl.load(p_sums, mask=o_i < n, other=0.0)  # [BR]
    if tl.max((b_old == INFINITY).to(tl.int32), 0) > 0:
        p_rows = p_weight + i_matrix * stride_matrix
        p_own = p_row_data + i_matrix * n
        b_sum = tl.zeros((BR,), tl.float64)
        if HAS_WEIGHT:
            b_length = lengths(p_rows, o_i, n, d, stride_row, stride_col, BR, BK)
        for c in tl.range(0, BM, BR, num_stages=1):
            o_j = i_tile * BM + c + tl.arange(0, BR)
            m_pair = (o_i[:, None] != o_j[None, :]) & (o_j < n)[None, :]
            b_deficit_i = tl.load(row_of(p_own, DEFICIT, plane, o_i), mask=o_i < n, other=0.0)  # [BR]
            b_deficit_j = tl.load(row_of(p_own, DEFICIT, plane, o_j), mask=o_j < n, other=0.0)  # [BR]
            b_deficit = b_deficit_i[:, None] + b_deficit_j[None, :]
            if HAS_WEIGHT:
                b_minus, b_plus, _ = exact_squares(
                    p_rows, o_i, o_j, b_length, n, d, stride_row, stride_col, ANGULAR or HALF_SPACE, BR, BK
                )
            if FROM_GRAM:
                b_far_minus, b_far_plus, b_deficit = squares_of_gram(
                    p_gram + i_matrix * gram_matrix, p_own, plane, o_i, o_j, n, gram_row
                )
                if HAS_WEIGHT:
                    b_minus = tl.where(is_near(b_far_minus, b_deficit, ANGULAR), b_minus, b_far_minus)
                    if ANGULAR or HALF_SPACE:
                        b_plus = tl.where(is_near(b_far_plus, b_deficit, ANGULAR), b_plus, b_far_plus)
                else:
                    b_minus, b_plus = b_far_minus, b_far_plus
            b_value = pair_value(b_minus, b_plus, b_deficit, S, ANGULAR, HALF_SPACE)
            if FAST:
                b_value = b_value / riesz_value(tl.full((BR, BR), 2.0, tl.float64), S) - 1.0
            b_sum += tl.sum(tl.where(m_pair, b_value, 0.0), 1)
        tl.store(p_sums, b_sum, mask=o_i < n)


@triton.jit
def pull_near(
    p_pull,
    p_weight,
    b_same,
    b_opposite,
    b_length_i,
    b_length_j,
    o_i,
    o_j,
    n,
    d,
    stride_row,
    stride_col,
    BOTH: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """``pull_i += sum_j same_ij (unit_j - unit_i) + opposite_ij (-unit_j - unit_i)``, all but the last sum in fp64."""
    o_k = tl.arange(0, BK).to(tl.int64)
    o_c = tl.arange(0, BR)
    for k in tl.range(0, d, BK, num_stages=1):
        m_k = o_k < d - k
        m_x = (o_i < n)[:, None] & m_k[None, :]
        p_k = p_weight + (k + o_k) * stride_col
        b_a = tl.load(p_k[None, :] + (o_i * stride_row)[:, None], mask=m_x, other=0.0)  # [BR, BK]
        b_a = b_a.to(tl.float64) / b_length_i[:, None]
        b_sum = tl.zeros((BR, BK), tl.float64)
        for c in tl.range(0, BR, num_stages=1):
            b_to_same = tl.sum(tl.where((o_c == c)[None, :], b_same, 0.0), 1)  # [BR]
            b_to_opposite = tl.sum(tl.where((o_c == c)[None, :], b_opposite, 0.0), 1)  # [BR]
            if tl.max(((b_to_same != 0.0) | (b_to_opposite != 0.0)).to(tl.int32), 0) > 0:
                b_length = tl.sum(tl.where(o_c == c, b_length_j, 0.0), 0)
                i_j = tl.sum(tl.where(o_c == c, o_j, 0), 0)
                b_b = tl.load(p_k + i_j * stride_row, mask=m_k & (i_j < n), other=0.0).to(tl.float64) / b_length  # [BK]
                b_sum += b_to_same[:, None] * (b_b[None, :] - b_a)
                if BOTH:
                    b_sum -= b_to_opposite[:, None] * (b_b[None, :] + b_a)
        p_x = p_pull + (o_i * d)[:, None] + (k + o_k)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BR, BK]
        tl.store(p_x, b_x + b_sum.to(b_x.dtype), mask=m_x)
    tl.debug_barrier()  # the next call reads what this one wrote, perhaps in other threads


@triton.jit
def near_slopes_kernel(
    p_weight,  # [batch, n, d] of any strides
    p_upstream,  # [batch, n] fp64
    p_row_data,  # [3, batch, n] fp64
    p_partial,  # [batch, tiles, n] fp64
    p_slopes,  # [batch, rows, cols] of the groups
    p_pull,  # [batch, n, d]
    n,
    d,
    strips,  # of BR rows, in the group of rows
    rows,
    cols,
    tiles,
    plane,
    first_row,
    first_tile,  # of the group of columns
    last_tile,
    stride_matrix,
    stride_row,
    stride_col,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Slopes of one strip of rows over the tiles where it met near pairs, and what the near pairs pull at its rows."""
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // strips
    o_i = first_row + i_program % strips * BR + tl.arange(0, BR)
    m_i = o_i < n
    p_rows = p_weight + i_matrix * stride_matrix
    p_own = p_row_data + i_matrix * n
    p_up = p_upstream + i_matrix * n
    for t in tl.range(first_tile, last_tile, num_stages=1):
        p_sums = p_partial + (i_matrix * tiles + t) * n + o_i
        b_old = tl.load(p_sums, mask=m_i, other=0.0)  # [BR]
        if tl.max((b_old == INFINITY).to(tl.int32), 0) > 0:
            b_length = lengths(p_rows, o_i, n, d, stride_row, stride_col, BR, BK)
            b_sum = tl.zeros((BR,), tl.float64)
            for c in tl.range(0, BM, BR, num_stages=1):
                o_j = tl.cast(t, tl.int64) * BM + c + tl.arange(0, BR)
                m_pair = (o_i[:, None] != o_j[None, :]) & m_i[:, None] & (o_j < n)[None, :]
                b_deficit_i = tl.load(row_of(p_own, DEFICIT, plane, o_i), mask=m_i, other=0.0)  # [BR]
                b_deficit_j = tl.load(row_of(p_own, DEFICIT, plane, o_j), mask=o_j < n, other=0.0)  # [BR]
                b_up_i = tl.load(p_up + o_i, mask=m_i, other=0.0)  # [BR]
                b_up_j = tl.load(p_up + o_j, mask=o_j < n, other=0.0)  # [BR]
                b_minus, b_plus, b_length_j = exact_squares(
                    p_rows, o_i, o_j, b_length, n, d, stride_row, stride_col, ANGULAR or HALF_SPACE, BR, BK
                )
                b_deficit = b_deficit_i[:, None] + b_deficit_j[None, :]
                b_bulk, b_radial, b_same, b_opposite = near_slopes(b_minus, b_plus, b_deficit, S, ANGULAR, HALF_SPACE)
                b_up = tl.where(m_pair, b_up_i[:, None] + b_up_j[None, :], 0.0)
                b_sum += tl.sum(tl.where(m_pair, b_radial * b_up, 0.0), 1)
                o_s = (o_i - first_row)[:, None] * cols + (o_j - first_tile * BM)[None, :]
                b_bulk = tl.where(m_pair, b_bulk * b_up, 0.0).to(p_slopes.dtype.element_ty)
                m_s = m_i[:, None] & (o_j < n)[None, :]
                tl.store(p_slopes + i_matrix * rows * cols + o_s, b_bulk, mask=m_s)
                pull_near(
                    p_pull + i_matrix * n * d,
                    p_rows,
                    tl.where(m_pair, b_same * b_up, 0.0),
                    tl.where(m_pair, b_opposite * b_up, 0.0),
                    b_length,
                    b_length_j,
                    o_i,
                    o_j,
                    n,
                    d,
                    stride_row,
                    stride_col,
                    ANGULAR or HALF_SPACE,
                    BR,
                    BK,
                )
            tl.store(p_sums, b_sum, mask=m_i)
