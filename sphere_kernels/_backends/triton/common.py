"""Parts of every kernel: products of blocks, and row data."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends import gpu
from sphere_kernels._common import rows

INTERPRETED = tl.constexpr(gpu.interpreted())
EPSILON = tl.constexpr(rows.EPSILON)


@triton.jit
def nearest_tf32(x):
    """fp32 rounded to the 11 bits that tensor cores see of it: they drop the others."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the carry would make a number of the NaN that GPUs produce


@triton.jit
def seen_as_tf32(x):
    """fp32 as a tensor core sees it; done for the interpreter only, which multiplies in full."""
    if INTERPRETED:
        return (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def dot_tf32x3(b_a, b_b, b_sum):
    """``tf32x3`` as the compiler does it: fp32 as the sum of two tf32, less the product of the smaller ones."""
    b_a_large = nearest_tf32(b_a)
    b_b_large = nearest_tf32(b_b)
    b_small = tl.dot(seen_as_tf32(b_a - b_a_large), b_b_large)
    b_small = tl.dot(b_a_large, seen_as_tf32(b_b - b_b_large), b_small)
    return b_sum + tl.dot(b_a_large, b_b_large, tl.where(b_small == b_small, b_small, 0.0))  # inf - inf was its rest


@triton.jit
def dot(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """``b_sum + b_a b_b`` for blocks of one dtype."""
    if PRECISION == "tf32":
        b_a = seen_as_tf32(b_a)
        b_b = seen_as_tf32(b_b)
    if PRECISION == "tf32x3" and INTERPRETED:
        return dot_tf32x3(b_a, b_b, b_sum)
    return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION, out_dtype=b_sum.dtype)


@triton.jit
def row_products(
    p_left,
    p_right,
    o_i,
    o_j,
    n,
    d,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Inner products of rows ``o_i`` of one matrix ``[n, d]`` and ``o_j`` of another, both contiguous."""
    o_k = tl.arange(0, BK)
    p_a = p_left + o_i[:, None] * d + o_k[None, :]
    p_b = p_right + o_j[None, :] * d + o_k[:, None]
    m_i = (o_i < n)[:, None]
    m_j = (o_j < n)[None, :]
    b_sum = tl.zeros((BM, BM), dtype=WIDE)
    for k in range(0, d, BK):
        b_a = tl.load(p_a, mask=m_i & (o_k < d - k)[None, :], other=0.0)  # [BM, BK]
        b_b = tl.load(p_b, mask=m_j & (o_k < d - k)[:, None], other=0.0)  # [BK, BM]
        b_sum = dot(b_a, b_b, b_sum, PRECISION)
        p_a += BK
        p_b += BK
    return b_sum


@triton.jit
def finite_or_nan(x):
    """NaN for infinity."""
    return x + (x - x)


# Row data ``[3, batch, n]`` fp64: norms, deficits, see `deficit_of`, and the scales that make unit rows of packed rows,
# or cosines of inner products.
NORM = tl.constexpr(0)
DEFICIT = tl.constexpr(1)
SCALE = tl.constexpr(2)


@triton.jit
def row_of(p_row_data, KIND: tl.constexpr, plane, o_rows):
    """Places in ``row_data``, ``plane`` apart for each of `NORM`, `DEFICIT` and `SCALE`."""
    if KIND == NORM:
        return p_row_data + o_rows
    elif KIND == DEFICIT:
        return p_row_data + (o_rows + plane)
    else:
        return p_row_data + (o_rows + plane + plane)


@triton.jit
def deficit_of(norm):
    """``1 - |unit row|^2``, without cancellation; fp64."""
    length = norm + EPSILON
    return (norm + length) * EPSILON / (length * length)


@triton.jit
def tile_of(p_schedule, i_tile, BM: tl.constexpr):
    """Tile row and column, and the offsets of rows and columns: int64."""
    i_row = tl.load(p_schedule + 2 * i_tile).to(tl.int64)
    i_col = tl.load(p_schedule + 2 * i_tile + 1).to(tl.int64)
    o_k = tl.arange(0, BM)
    return i_row, i_col, i_row * BM + o_k, i_col * BM + o_k
