"""The kernel of products of matrices that need no triangle: projections, updates, gradients, directions."""

from __future__ import annotations

import triton
import triton.language as tl

from sphere_kernels._backends.triton.common import dot, nearest_tf32

BAND = tl.constexpr(8)  # block rows that share the block columns they meet while these are in L2


@triton.jit
def widened(b_x, PRECISION: tl.constexpr, WIDE: tl.constexpr, AS_IS: tl.constexpr):
    """A block in the dtype that is multiplied."""
    if AS_IS:
        return b_x
    else:
        b_x = b_x.to(WIDE)
        if PRECISION == "tf32":
            b_x = nearest_tf32(b_x)
        return b_x


@triton.jit
def product_kernel(
    p_a,  # [batch, rows, depth] of any strides
    p_b,  # [batch, depth, cols] of any strides
    p_scale,  # [batch, depth] fp64; without SCALE anything
    p_addend,  # [batch, rows, cols] of any strides; without ADDEND anything
    p_out,  # [batch, rows, cols] of any strides
    rows,
    cols,
    depth,
    scale_matrix,
    a_matrix,
    a_row,
    a_col,
    b_matrix,
    b_row,
    b_col,
    addend_matrix,
    addend_row,
    addend_col,
    out_matrix,
    out_row,
    out_col,
    SCALE: tl.constexpr,
    ADDEND: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    AS_IS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One block of ``[out +] [addend +] a diag(scale) b``, rounded once to the dtype of out."""
    across = tl.cdiv(cols, BN)
    down = tl.cdiv(rows, BM)
    i_program = tl.program_id(0).to(tl.int64)
    i_matrix = i_program // (down * across)
    i_tile = i_program % (down * across)
    first = i_tile // (BAND * across) * BAND
    band = tl.minimum(down - first, BAND)
    o_i = (first + i_tile % (BAND * across) % band) * BM + tl.arange(0, BM)
    o_j = (i_tile % (BAND * across) // band) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK).to(tl.int64)
    m_i = (o_i < rows)[:, None]
    m_j = (o_j < cols)[None, :]
    p_left = p_a + i_matrix * a_matrix + o_i[:, None] * a_row
    p_right = p_b + i_matrix * b_matrix + o_j[None, :] * b_col
    b_sum = tl.zeros((BM, BN), dtype=WIDE)
    for k in range(0, depth, BK):
        m_k = o_k < depth - k
        b_a = tl.load(p_left + ((k + o_k) * a_col)[None, :], mask=m_i & m_k[None, :], other=0.0)  # [BM, BK]
        b_b = tl.load(p_right + ((k + o_k) * b_row)[:, None], mask=m_j & m_k[:, None], other=0.0)  # [BK, BN]
        if SCALE:
            b_scale = tl.load(p_scale + i_matrix * scale_matrix + k + o_k, mask=m_k, other=0.0)  # [BK]
            b_a = b_a * b_scale.to(WIDE)[None, :]
        b_a = widened(b_a, PRECISION, WIDE, AS_IS)
        b_b = widened(b_b, PRECISION, WIDE, AS_IS)
        b_sum = dot(b_a, b_b, b_sum, PRECISION)
    m_out = m_i & m_j
    if ADDEND:
        p_x = p_addend + i_matrix * addend_matrix + o_i[:, None] * addend_row + o_j[None, :] * addend_col
        b_sum += tl.load(p_x, mask=m_out, other=0.0).to(WIDE)
    p_x = p_out + i_matrix * out_matrix + o_i[:, None] * out_row + o_j[None, :] * out_col
    if ACCUMULATE:
        b_sum += tl.load(p_x, mask=m_out, other=0.0).to(WIDE)
    tl.store(p_x, b_sum.to(p_out.dtype.element_ty), mask=m_out)
