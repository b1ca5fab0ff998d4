"""Gram matrices by the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels._backends import native

gram = native.gram


def gram_energy(gram: Tensor, weight: Tensor | None, s: float, distance: str, half_space: bool) -> Tensor:
    """Energy of every neuron, ``[..., n]`` fp64."""
    matrices, rows = native.merged(gram), None if weight is None else native.merged(weight)
    if matrices.stride(-1) != 1:
        matrices = matrices.contiguous()
    energy = gram.new_empty(gram.shape[:-1], dtype=torch.float64)
    native.cpu.gram_energy(
        native.view(matrices),
        None if rows is None else native.view(rows),
        s,
        distance == "angular",
        half_space,
        *native.tier_and_threads(),
        energy.data_ptr(),
    )
    return energy


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
    left, cross, inner = map(native.merged, (left, cross, inner))
    rows = None if weight is None else native.merged(weight)
    energy = gram.new_empty(gram.shape[:-1], dtype=torch.float64)
    with native.written(gram, contiguous=gram.stride(-1) != 1) as matrices:
        native.cpu.gram_update_energy(
            native.view(matrices),
            native.view(left),
            native.view(cross),
            native.view(inner),
            None if rows is None else native.view(rows),
            s,
            distance == "angular",
            half_space,
            *native.tier_and_threads(),
            energy.data_ptr(),
        )
    return energy
