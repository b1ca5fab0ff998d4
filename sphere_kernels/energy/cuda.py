"""Pair energy by the CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import cuda
from sphere_kernels.dispatch import register
from sphere_kernels.native import merged, view


@register("pair_energy", "cuda", cuda.supports)
def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every row, ``[..., n]`` fp64."""
    energy = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    rows, precision = merged(weight), cuda.precision(weight.device)
    kind = view(rows), s, distance == "angular", half_space
    memory = cuda.workspace("pair_energy", weight, *kind)
    cuda.launch("pair_energy", weight, *kind, precision, memory.data_ptr(), energy.data_ptr())
    return energy


@register("pair_energy_backward", "cuda", cuda.no_backward)
def pair_energy_backward(*arguments: Any) -> Tensor:
    """Refused before it is called."""
    raise NotImplementedError
