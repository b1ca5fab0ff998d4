"""A low-rank update of a Gram matrix as one product."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._common.rows import one_batch


def update_terms(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[C, R]`` and ``[R, C]`` for ``Z R^T + R Z^T + R (X X^T) R^T = [C, R] [R, C]^T``, and the new diagonal.

    ``C = Z + R (X X^T) / 2``. The diagonal's error enters every pair of its row: it is fp64, rounded once.
    """
    left = one_batch(left).double()
    half = one_batch(cross).double() + 0.5 * left @ one_batch(inner).double()
    diagonal = one_batch(gram).diagonal(dim1=-2, dim2=-1).double().add(2 * (half * left).sum(-1))
    first, second = (torch.cat(pair, -1).to(gram.dtype) for pair in ((half, left), (left, half)))
    return first, second, diagonal.to(gram.dtype)
