"""Hyperspherical energy (s = 1) by a skilled PyTorch user: of ``[n, d]`` fp32 rows, summed in fp64.

Each docstring names the memory that a way holds besides the unit rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK = 256
SMALL = 1e-12


@cache
def compile_once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, dynamic=False)


def unit_rows(weight: Tensor) -> Tensor:
    return weight / (weight.norm(dim=1, keepdim=True) + 1e-8)


def total(inverse: Tensor) -> Tensor:
    """The sum of a matrix: each row in fp32, then over rows in fp64 (``sum(dtype=float64)`` would copy the matrix)."""
    return inverse.sum(1).sum(dtype=torch.float64)


def gram_in_place(weight: Tensor) -> Tensor:
    """``X @ X.T``, all later steps in place: n x n."""
    unit = unit_rows(weight)
    inverse = (unit @ unit.T).mul_(-2).add_(2).clamp_(min=SMALL).rsqrt_().fill_diagonal_(0)
    return total(inverse)


def cdist(weight: Tensor) -> Tensor:
    """``torch.cdist``, all later steps in place: n x n."""
    unit = unit_rows(weight)
    return total(torch.cdist(unit, unit).fill_diagonal_(torch.inf).reciprocal_())


def pdist(weight: Tensor) -> Tensor:
    """``torch.pdist``, all later steps in place: n (n - 1) / 2."""
    return 2 * torch.pdist(unit_rows(weight)).reciprocal_().sum().double()


def chunked(weight: Tensor) -> Tensor:
    """`CHUNK` rows at a time, ``2 - 2 X X^T`` in one ``addmm``: `CHUNK` x n."""
    unit, energy = unit_rows(weight), weight.new_zeros((), dtype=torch.float64)
    for start in range(0, len(unit), CHUNK):
        inverse = _squares(unit[start : start + CHUNK], unit).clamp_(min=SMALL).rsqrt_()
        inverse.diagonal(start).zero_()
        energy += total(inverse)
    return energy


def chunked_triangle(weight: Tensor) -> Tensor:
    """`chunked` from the diagonal on; symmetry gives the other half: `CHUNK` x n."""
    unit, energy = unit_rows(weight), weight.new_zeros((), dtype=torch.float64)
    for start in range(0, len(unit), CHUNK):
        inverse = _squares(unit[start : start + CHUNK], unit[start:]).clamp_(min=SMALL).rsqrt_()
        inverse.diagonal().zero_()
        energy += 2 * total(inverse) - total(inverse[:, :CHUNK])
    return energy


def _formula(weight: Tensor) -> Tensor:
    unit = unit_rows(weight)
    square = (2 - 2 * (unit @ unit.T)).clamp(min=SMALL)
    return square.rsqrt().fill_diagonal_(0).sum(dtype=torch.float64)


def compiled(weight: Tensor) -> Tensor:
    """The formula under ``torch.compile``, for one shape at a time: n x n."""
    return compile_once(_formula)(weight)


def keops(weight: Tensor) -> Tensor:
    """The formula as a KeOps reduction: nothing. No matrix product, so best for small d."""
    from pykeops.torch import LazyTensor

    unit = unit_rows(weight)
    index = torch.arange(len(unit), dtype=unit.dtype)
    rows, cols = LazyTensor(unit[:, None, :]), LazyTensor(unit[None, :, :])
    i, j = LazyTensor(index[:, None, None]), LazyTensor(index[None, :, None])
    inverse = (2 - 2 * (rows | cols)).clamp(SMALL, 4.0).rsqrt()
    return (0.5 - (i - j).abs()).ifelse(0 * inverse, inverse).sum(1).sum(dtype=torch.float64)


def exact(weight: Tensor) -> Tensor:
    """The yardstick: in fp64, with the true lengths of the unit rows ``w / (|w| + 1e-8)``, not 1."""
    unit, energy = unit_rows(weight.double()), weight.new_zeros((), dtype=torch.float64)
    square = unit.square().sum(1)
    for start in range(0, len(unit), CHUNK):
        rows = slice(start, start + CHUNK)
        distance = (square[rows, None] + square - 2 * unit[rows] @ unit.T).clamp_(min=SMALL).rsqrt_()
        distance.diagonal(start).zero_()
        energy += distance.sum()
    return energy


def gradient_gram(weight: Tensor) -> Tensor:
    """Autograd through ``addmm``: three or four n x n."""
    return _backward(_smooth, weight)


def gradient_cdist(weight: Tensor) -> Tensor:
    """Autograd through ``torch.cdist``: three or four n x n."""

    def energy(leaf: Tensor) -> Tensor:
        unit = unit_rows(leaf)
        self_pairs = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        return total(torch.cdist(unit, unit).masked_fill(self_pairs, torch.inf).reciprocal())

    return _backward(energy, weight)


def gradient_compiled(weight: Tensor) -> Tensor:
    """Autograd through the formula under ``torch.compile``: one or two n x n."""
    return _backward(compile_once(_smooth), weight)


def gradient_function(weight: Tensor) -> Tensor:
    """A ``torch.autograd.Function`` with the symmetric gradient ``2 dG @ X``, epilogue in place: n x n."""
    return _backward(lambda leaf: _Analytic.apply(unit_rows(leaf)), weight)


def gradient_triangle(weight: Tensor) -> Tensor:
    """A ``torch.autograd.Function`` that forms the gradient in the forward pass, in chunks from the diagonal on:
    `CHUNK` x n."""
    return _backward(lambda leaf: _Triangle.apply(unit_rows(leaf)), weight)


def exact_gradient(weight: Tensor) -> Tensor:
    """The yardstick: autograd in fp64."""
    return gradient_gram(weight.double())


def _squares(left: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(left.new_full((1, 1), 2.0), left, right.T, alpha=-2)


def _backward(energy: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    leaf = weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(leaf), leaf)
    return gradient


def _smooth(weight: Tensor) -> Tensor:
    unit = unit_rows(weight)
    return total(_squares(unit, unit).fill_diagonal_(torch.inf).clamp(min=SMALL).rsqrt())


class _Analytic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        inverse = _squares(unit, unit).clamp_(min=SMALL).rsqrt_().fill_diagonal_(0)
        energy = total(inverse)
        ctx.save_for_backward(unit, inverse.pow_(3))
        return energy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        unit, slope = ctx.saved_tensors
        return (slope @ unit).mul_(2 * grads[0])


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        energy, pull = unit.new_zeros((), dtype=torch.float64), torch.zeros_like(unit)
        for start in range(0, len(unit), CHUNK):
            rows, stop = unit[start : start + CHUNK], start + CHUNK
            inverse = _squares(rows, unit[start:]).clamp_(min=SMALL).rsqrt_()
            inverse.diagonal().zero_()
            energy += 2 * total(inverse) - total(inverse[:, :CHUNK])
            slope = inverse.pow_(3)
            pull[start:stop].addmm_(slope, unit[start:])
            pull[stop:].addmm_(slope[:, CHUNK:].T, rows)
        ctx.save_for_backward(pull)
        return energy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return ctx.saved_tensors[0] * (2 * grads[0])
