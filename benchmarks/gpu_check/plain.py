"""Plain PyTorch beside the kernels: products in every precision for the error budgets, and the timed plain ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.energy import SMALL


def rounded(x: Tensor) -> Tensor:
    """Round fp32 to the 11 bits of tf32, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def seen(x: Tensor) -> Tensor:
    """Truncate fp32 as a tensor core does: drop the bits past tf32's."""
    return (x.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


@contextlib.contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Allow or forbid tf32 for fp32 products within the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor, dot: str) -> Tensor:
    """``a b``, with fp32 operands multiplied in the way ``dot``, on the units that the kernels use for that way."""
    if a.dtype != torch.float32 or dot == "ieee":
        with tensor_cores(False):
            return a @ b
    high_a, high_b = rounded(a), rounded(b)
    with tensor_cores(True):
        if dot == "tf32":
            return high_a @ high_b
        return seen(a - high_a) @ high_b + high_a @ seen(b - high_b) + high_a @ high_b


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dot: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.dot = dot
        return product(a, b, dot)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return product(grads[0], b.mT, ctx.dot), product(a.mT, grads[0], ctx.dot), None


def multiply(dot: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`product` with a gradient, for autograd."""
    return lambda a, b: _Product.apply(a, b, dot)


def in_tf32(run: Callable[..., Any]) -> Callable[..., Any]:
    """The way ``run`` with tf32 products."""

    def way(*arguments: Any) -> Any:
        with tensor_cores(True):
            return run(*arguments)

    return way


def half_gram(weight: Tensor) -> Tensor:
    """Energy from 16-bit ``W @ W.T`` with an fp32 result, normalised after the product, in place: n x n."""
    inverse = 1 / (weight.norm(dim=1, dtype=torch.float32) + 1e-8)
    square = torch.mm(weight, weight.T, out_dtype=torch.float32)
    square.mul_(inverse).mul_(-2 * inverse[:, None]).add_(2).clamp_(min=SMALL).rsqrt_().fill_diagonal_(0)
    return square.sum(1).sum(dtype=torch.float64)


def batched(weight: Tensor) -> Tensor:
    """Energies of ``[batch, n, d]`` by one ``bmm``, all later steps in place: batch x n x n."""
    unit = weight / (weight.norm(dim=-1, keepdim=True) + 1e-8)
    inverse = (unit @ unit.mT).mul_(-2).add_(2).clamp_(min=SMALL).rsqrt_()
    inverse.diagonal(dim1=-2, dim2=-1).zero_()
    return inverse.sum(-1).sum(-1, dtype=torch.float64)


def batched_formula(weight: Tensor) -> Tensor:
    """`batched` without mutation, for ``torch.compile``."""
    unit = weight / (weight.norm(dim=-1, keepdim=True) + 1e-8)
    index = torch.arange(weight.shape[-2], device=weight.device)
    square = (2 - 2 * (unit @ unit.mT)).clamp(min=SMALL)
    return torch.where(index == index[:, None], 0, square.rsqrt()).sum((-2, -1), dtype=torch.float64)
