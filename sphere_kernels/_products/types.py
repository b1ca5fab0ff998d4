"""The type of an implementation of the products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Products:
    """Products of matrices ``[..., rows, columns]`` of one dtype, fp32 or fp64; results are in it.

    Attributes:
        gram: ``A -> A A^T``, a fresh tensor.
        matmul: ``A, B -> A B``, a fresh contiguous tensor.
        add_: ``C, A, B``: ``C += A B`` in place.
        subtract_gram_: ``H, A``: ``H -= A A^T`` in place; ``H`` is symmetric and stays exactly so.
        symmetric: whether ``gram`` is symmetric to the last bit.
    """

    gram: Callable[[Tensor], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    add_: Callable[[Tensor, Tensor, Tensor], object]
    subtract_gram_: Callable[[Tensor, Tensor], object]
    symmetric: bool = True
