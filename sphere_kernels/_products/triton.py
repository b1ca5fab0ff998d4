"""The products that several operations build on, by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton.launch import Packed, gram, product, symmetric_product
from sphere_kernels._products.types import Products


def products() -> Products:
    """Products by the Triton kernels."""
    return TRITON


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` for ``[..., n, k]`` and ``[..., k, m]``, in the dtype of ``left``; contiguous."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    product(gpu.merged(left), gpu.merged(right), gpu.merged(out))
    return out


def _add_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left right``."""
    with gpu.written(out) as matrices:
        product(gpu.merged(left), gpu.merged(right), matrices, accumulate=True)


def _subtract_gram_(out: Tensor, factor: Tensor) -> None:
    """``out -= factor factor^T`` for symmetric ``[..., n, n]``, of which the upper triangle is read."""
    with gpu.written(out, contiguous=out.stride(-1) != 1) as matrices:
        packed = Packed.of(gpu.merged(factor), factor.dtype, normalize=False)
        symmetric_product(packed, matrices, subtract=True)


TRITON = Products(
    gram=lambda a: gram(a, False),
    matmul=_matmul,
    add_=_add_,
    subtract_gram_=_subtract_gram_,
)
