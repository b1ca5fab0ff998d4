"""Gram matrices carried over updates by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import cuda
from sphere_kernels._backends.native import merged, view, written
from sphere_kernels.gram.update import update_terms


def gram_update_energy_(
    gram: Tensor,
    left: Tensor,
    cross: Tensor,
    inner: Tensor,
    weight: Tensor | None,
    s: float,
    distance: str,
    half_space: bool,
) -> Tensor:
    """Update ``gram`` in place; the energy of every neuron, ``[..., n]`` fp64."""
    precision = cuda.precision(gram.device)
    first, second, diagonal = update_terms(gram, left, cross, inner)
    diagonal = diagonal.contiguous()
    rows = None if weight is None else merged(weight)
    energy = gram.new_empty(gram.shape[:-1], dtype=torch.float64)
    with written(gram) as matrices:
        memory = cuda.workspace("gram_update_energy", gram, view(matrices), view(first))
        cuda.launch(
            "gram_update_energy",
            gram,
            view(matrices),
            view(first),
            view(second),
            diagonal.data_ptr(),
            None if rows is None else view(rows),
            s,
            distance == "angular",
            half_space,
            precision,
            memory.data_ptr(),
            energy.data_ptr(),
        )
    return energy
