"""The kernel that makes rows ready for products, and the one that carries a gradient through their normalisation."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import DEFICIT, EPSILON, NORM, SCALE, deficit_of, nearest_tf32, row_of
from sphere_kernels._backends.triton.riesz import antipode_slope


@triton.jit
def power_of_two(norm, SHIFT: tl.constexpr):
    """The power of two (fp64) that brings a norm into ``[2^SHIFT, 2^(SHIFT + 1))``; a finite one for any norm."""
    exponent = (norm.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.minimum(tl.maximum(exponent, SHIFT), 2045 + SHIFT)
    return ((2046 + SHIFT - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rows_pack_kernel(
    p_weight,  # [batch, n, d] of any strides
    p_packed,  # [batch * n, width], or anything without NORMALIZE
    p_row_data,  # [3, batch * n] fp64
    total,  # batch * n
    n,
    d,
    width,
    stride_matrix,
    stride_row,
    stride_col,
    NORMALIZE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROUND: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows side by side, zero up to ``width``; where NORMALIZE, times the power of two that makes their norm near 1.

    That is exact, spares the products both overflow and the rounding of unit rows, and leaves 16-bit rows 16 bits wide.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK).to(tl.int64)
    m_r = (o_r < total)[:, None]
    p_row = p_weight + ((o_r // n) * stride_matrix + (o_r % n) * stride_row)[:, None]
    b_factor = tl.full((BR,), 1.0, tl.float64)
    if NORMALIZE:
        b_square = tl.zeros((BR,), tl.float64)
        for k in range(0, d, BK):
            m_x = m_r & (o_k < d - k)[None, :]
            b_x = tl.load(p_row + ((k + o_k) * stride_col)[None, :], mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
            b_square += tl.sum(b_x * b_x, 1)
        b_norm = tl.sqrt(b_square)
        b_factor = power_of_two(b_norm, SHIFT)
        tl.store(row_of(p_row_data, NORM, total, o_r), b_norm, mask=o_r < total)
        tl.store(row_of(p_row_data, DEFICIT, total, o_r), deficit_of(b_norm), mask=o_r < total)
        # An overflowed norm must not turn a finite row into a plausible zero row.
        b_scale = 1.0 / (b_factor * (b_norm + EPSILON + (b_norm - b_norm)))
        tl.store(row_of(p_row_data, SCALE, total, o_r), b_scale, mask=o_r < total)
    for k in range(0, width, BK):
        m_x = m_r & (o_k < d - k)[None, :]
        b_x = tl.load(p_row + ((k + o_k) * stride_col)[None, :], mask=m_x, other=0.0)  # [BR, BK]
        if NORMALIZE:
            b_x = (b_x.to(tl.float64) * b_factor[:, None]).to(p_packed.dtype.element_ty)
        if ROUND:
            b_x = nearest_tf32(b_x)
        m_out = m_r & (o_k < width - k)[None, :]
        tl.store(p_packed + (o_r * width)[:, None] + (k + o_k)[None, :], b_x, mask=m_out)


@triton.jit
def rows_gradient_kernel(
    p_pull,  # [batch * n, d] gradient for the unit rows, less its radial part
    p_weight,  # [batch, n, d] of any strides
    p_norm,  # [batch * n] fp64
    p_partial,  # [batch, tiles, n] fp64: sums of the radial part over the tiles of a column
    p_upstream,  # [batch * n] fp64
    p_out,  # [batch * n, d]
    total,
    n,
    d,
    tiles,
    stride_matrix,
    stride_row,
    stride_col,
    S: tl.constexpr,
    ANGULAR: tl.constexpr,
    HALF_SPACE: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """``(x - u (unit . x)) / (|w| + eps)``, ``x = pull + radial unit``, ``u = w / |w|``; zero for a zero row."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK).to(tl.int64)
    m_1 = o_r < total
    m_r = m_1[:, None]
    p_row = p_weight + ((o_r // n) * stride_matrix + (o_r % n) * stride_row)[:, None]
    p_x = p_pull + (o_r * d)[:, None]
    b_norm = tl.load(p_norm + o_r, mask=m_1, other=0.0)  # [BR]
    b_length = b_norm + EPSILON
    b_inverse = 1.0 / b_norm
    b_radial = tl.zeros((BR,), tl.float64)
    for t in range(0, tiles):
        slot = (o_r // n) * tiles + t
        b_radial += tl.load(p_partial + slot * n + o_r % n, mask=m_1, other=0.0)
    if HALF_SPACE:
        b_upstream = tl.load(p_upstream + o_r, mask=m_1, other=0.0)
        b_radial += b_upstream * antipode_slope(b_norm, S, ANGULAR)
    # All but 1e-8 of the radial part is lost, so that it stays a number per row and never rounds into the other.
    b_along = tl.zeros((BR,), tl.float64)
    for k in range(0, d, BK):
        m_x = m_r & (o_k < d - k)[None, :]
        b_w = tl.load(p_row + ((k + o_k) * stride_col)[None, :], mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
        b_x = tl.load(p_x + (k + o_k)[None, :], mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
        b_along += tl.sum(b_w * b_inverse[:, None] * b_x, 1)
    b_along = b_along * (b_norm / b_length) - b_radial * b_norm * EPSILON / (b_length * b_length)
    for k in range(0, d, BK):
        m_x = m_r & (o_k < d - k)[None, :]
        b_w = tl.load(p_row + ((k + o_k) * stride_col)[None, :], mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
        b_x = tl.load(p_x + (k + o_k)[None, :], mask=m_x, other=0.0).to(tl.float64)  # [BR, BK]
        b_x = (b_x - b_w * b_inverse[:, None] * b_along[:, None]) / b_length[:, None]
        b_x = tl.where((b_norm == 0.0)[:, None], 0.0, b_x)
        tl.store(p_out + (o_r * d)[:, None] + (k + o_k)[None, :], b_x.to(p_out.dtype.element_ty), mask=m_x)
