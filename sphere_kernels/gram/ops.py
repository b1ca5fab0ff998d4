"""The Gram matrices as torch.library operations: schemas, fakes and the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels._common.library import operation
from sphere_kernels._common.rows import compute_dtype
from sphere_kernels.gram.reference import gram_gradient


@operation()
def gram(weight: Tensor, normalize: bool, impl: str) -> Tensor:
    """``W W^T`` of ``[..., n, d]`` or of its unit rows: ``[..., n, n]``, fp64 for an fp64 weight, else fp32."""
    return dispatch.implementation("gram", impl, weight)(weight, normalize)


@torch.library.register_fake(gram)
def _(weight: Tensor, normalize: bool, impl: str) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], weight.shape[-2]), dtype=compute_dtype(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.normalize, _ = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    gradient = dispatch.outside_autocast(gram_gradient, weight.device.type)
    return gradient(grad, weight, ctx.normalize), None, None


torch.library.register_autograd(gram, _backward, setup_context=_save)


@operation()
def gram_energy(gram: Tensor, weight: Tensor | None, s: float, distance: str, half_space: bool, impl: str) -> Tensor:
    """Energies ``[..., n]`` fp64 of the rows whose inner products ``gram`` holds."""
    return dispatch.implementation("gram_energy", impl, gram)(gram, weight, s, distance, half_space)


@torch.library.register_fake(gram_energy)
def _(gram: Tensor, *_: Any) -> Tensor:
    return gram.new_empty(gram.shape[:-1], dtype=torch.float64)


@operation(mutates=("gram",))
def gram_update_energy_(
    gram: Tensor,
    left: Tensor,
    cross: Tensor,
    inner: Tensor,
    weight: Tensor | None,
    s: float,
    distance: str,
    half_space: bool,
    impl: str,
) -> Tensor:
    """``gram += cross left^T + left cross^T + left inner left^T``; returns the energies ``[..., n]`` fp64."""
    run = dispatch.implementation("gram_update_energy_", impl, gram)
    return run(gram, left, cross, inner, weight, s, distance, half_space)


@torch.library.register_fake(gram_update_energy_)
def _(gram: Tensor, *_: Any) -> Tensor:
    return gram.new_empty(gram.shape[:-1], dtype=torch.float64)
