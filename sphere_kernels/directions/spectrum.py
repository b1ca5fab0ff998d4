"""The number of eigenvalues that count."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_rank(values: Tensor, total: Tensor, floor: Tensor, energy_ratio: float, rank: int | None) -> Tensor:
    """``#{cumsum(values) / total <= energy_ratio} + 1`` or ``rank``, at most the number of values above ``floor``.

    Args:
        values: ``[..., k]``, descending.
        total, floor: ``[...]``, the trace and the largest eigenvalue that may be a rounding error.
        energy_ratio, rank: as for `principal_directions`.

    Returns:
        int64 ``[...]``.
    """
    numerical = (values > floor.unsqueeze(-1)).sum(-1)
    if rank is not None:
        return numerical.clamp(max=rank)
    kept = values.double().cumsum(-1) / total.unsqueeze(-1) <= energy_ratio
    return torch.minimum(kept.sum(-1) + 1, numerical)


def noise_floor(values: Tensor, longest: int) -> Tensor:
    """The numerical rank rule for eigenvalues of a Gram matrix: ``max(n, d) eps`` times the largest."""
    return values[..., 0] * longest * torch.finfo(values.dtype).eps


def trace(gram: Tensor) -> Tensor:
    """fp64 sum of all eigenvalues."""
    return gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
