"""The projection as torch.library operations: schemas, fakes and the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels._common.library import operation


@operation()
def sparse_projection(update: Tensor, basis: Tensor, alpha: float, impl: str) -> Tensor:
    """``update - alpha (update U) U^T``; the basis is a constant."""
    return dispatch.implementation("sparse_projection", impl, update)(update, basis, alpha)


@torch.library.register_fake(sparse_projection)
def _(update: Tensor, basis: Tensor, alpha: float, impl: str) -> Tensor:
    return update.new_empty(update.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, basis, *ctx.options = inputs
    ctx.save_for_backward(basis)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (basis,) = ctx.saved_tensors
    return sparse_projection(grad, basis, *ctx.options), None, None, None  # the projector is symmetric


torch.library.register_autograd(sparse_projection, _backward, setup_context=_save)


@operation(mutates=("weight",))
def apply_projected_update_(
    weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float, impl: str
) -> None:
    """``weight += left @ projected(right)``, or ``projected(right)`` where ``left`` is None."""
    dispatch.implementation("apply_projected_update_", impl, weight)(weight, left, right, basis, alpha)


@torch.library.register_fake(apply_projected_update_)
def _(weight: Tensor, left: Tensor | None, right: Tensor, basis: Tensor, alpha: float, impl: str) -> None:
    return None
