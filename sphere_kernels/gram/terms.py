"""What a low-rank update of a weight adds to its Gram matrix, as one symmetric product."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels.rows import one_batch


def update_terms(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Z R^T + R Z^T + R (X X^T) R^T = [C, R] [R, C]^T`` with ``C = Z + R (X X^T) / 2``.

    Args:
        gram, left, cross, inner: as for `gram_update_energy_`; the gram matrix is that before the update.

    Returns:
        ``[C, R]`` and ``[R, C]``, ``[count, n, 2 b]`` in the dtype of ``gram``, and the new diagonal ``[count, n]``,
        computed in fp64 and rounded to that dtype once: its error enters every pair of its row.
    """
    left = one_batch(left).double()
    half = one_batch(cross).double() + 0.5 * left @ one_batch(inner).double()
    diagonal = one_batch(gram).diagonal(dim1=-2, dim2=-1).double().add(2 * (half * left).sum(-1))
    first, second = (torch.cat(pair, -1).to(gram.dtype) for pair in ((half, left), (left, half)))
    return first, second, diagonal.to(gram.dtype)
