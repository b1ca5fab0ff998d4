"""Pair energy by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import native
from sphere_kernels._common.rows import compute_dtype


def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every row, ``[..., n]`` fp64."""
    energy = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    rows, angular = native.merged(weight), distance == "angular"
    native.cpu.pair_energy(native.view(rows), s, angular, half_space, *native.tier_and_threads(), energy.data_ptr())
    return energy


def pair_energy_backward(grad: Tensor, weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Gradient of ``sum(grad * energy)`` for the weight, in its dtype."""
    grad = grad.double().contiguous().resolve_neg()
    gradient = weight.new_empty(weight.shape, dtype=compute_dtype(weight))
    rows, angular = native.merged(weight), distance == "angular"
    native.cpu.pair_energy_backward(
        grad.data_ptr(), native.view(rows), s, angular, half_space, *native.tier_and_threads(), gradient.data_ptr()
    )
    return gradient.to(weight.dtype)
