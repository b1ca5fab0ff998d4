"""The energy as torch.library operations: schemas, fakes and the first derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels._common.library import operation


@operation()
def pair_energy(weight: Tensor, s: float, distance: str, half_space: bool, impl: str) -> Tensor:
    """Energy of every row of ``[..., n, d]``: ``[..., n]`` fp64."""
    return dispatch.implementation("pair_energy", impl, weight)(weight, s, distance, half_space)


@torch.library.register_fake(pair_energy)
def _(weight: Tensor, s: float, distance: str, half_space: bool, impl: str) -> Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=torch.float64)


@operation()
def pair_energy_backward(grad: Tensor, weight: Tensor, s: float, distance: str, half_space: bool, impl: str) -> Tensor:
    """Gradient of ``sum(grad * pair_energy(weight))``, in the weight's shape and dtype."""
    return dispatch.implementation("pair_energy_backward", impl, weight)(grad, weight, s, distance, half_space)


@torch.library.register_fake(pair_energy_backward)
def _(grad: Tensor, weight: Tensor, s: float, distance: str, half_space: bool, impl: str) -> Tensor:
    return weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, *ctx.options = inputs
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return pair_energy_backward(grad, weight, *ctx.options), None, None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError(
        "hyperspherical_energy has a first derivative only; its gradient cannot be differentiated"
    )


torch.library.register_autograd(pair_energy, _backward, setup_context=_save)
torch.library.register_autograd(pair_energy_backward, _no_second_derivative)
