"""Pair energy by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import cuda
from sphere_kernels._backends.native import merged, view


def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every row, ``[..., n]`` fp64."""
    energy = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    rows, precision = merged(weight), cuda.precision(weight.device)
    kind = view(rows), s, distance == "angular", half_space
    memory = cuda.workspace("pair_energy", weight, *kind)
    cuda.launch("pair_energy", weight, *kind, precision, memory.data_ptr(), energy.data_ptr())
    return energy
