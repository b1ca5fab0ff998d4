"""fp64 oracles: the formulas written out, differences formed directly, everything in memory, autograd for gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-8


def norms(weight: Tensor) -> Tensor:
    # The norm of a zero row has no gradient; the contract says zero.
    square = weight.square().sum(-1)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


def unit_rows(weight: Tensor) -> Tensor:
    return weight / (norms(weight) + EPSILON).unsqueeze(-1)


def riesz(t: Tensor, s: float) -> Tensor:
    return -t.log() if s == 0 else t.pow(-s)


def clamped(square: Tensor) -> Tensor:
    """``t`` from ``t^2``, at least 1e-6, without gradient there."""
    return torch.where(square > 1e-12, square, torch.full_like(square, 1e-12).detach()).sqrt()


def distances(weight: Tensor, distance: str) -> Tensor:
    unit, norm = unit_rows(weight), norms(weight)
    difference = (unit.unsqueeze(-2) - unit.unsqueeze(-3)).square().sum(-1)
    if distance == "euclidean":
        return clamped(difference)
    total = (unit.unsqueeze(-2) + unit.unsqueeze(-3)).square().sum(-1)
    short = EPSILON / (norm + EPSILON)  # 1 - |unit|, without cancellation
    deficit = short * (2 - short)  # 1 - |unit|^2
    deficit = deficit.unsqueeze(-1) + deficit.unsqueeze(-2)
    # arccos(g) = 2 atan2(sqrt(2 - 2 g), sqrt(2 + 2 g)), good at both ends
    angle = 2 * torch.atan2((difference + deficit).clamp(min=1e-300).sqrt(), (total + deficit).clamp(min=1e-300).sqrt())
    return clamped(angle.square())


def per_neuron(weight: Tensor, s: float = 1.0, distance: str = "euclidean", half_space: bool = False) -> Tensor:
    """``E_i`` from the definition: for half space, all 2n rows and the first n results."""
    n = weight.shape[-2]
    weight = weight.double()
    if half_space:
        weight = torch.cat([weight, -weight], -2)
    others = ~torch.eye(weight.shape[-2], dtype=torch.bool, device=weight.device)
    values = riesz(torch.where(others, distances(weight, distance), 1.0), s)
    return (values * others).sum(-1)[..., :n]


def per_neuron_of_gram(gram: Tensor, s: float = 1.0, distance: str = "euclidean", half_space: bool = False) -> Tensor:
    """``E_i`` from the inner products of rows that are not normalised, themselves taken to be exact."""
    n, gram = gram.shape[-1], gram.double()
    if half_space:
        gram = torch.cat([torch.cat([gram, -gram], -1), torch.cat([-gram, gram], -1)], -2)
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit, scale = norm / (norm + EPSILON), norm + EPSILON
    inner = gram / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    square = unit.square().unsqueeze(-1) + unit.square().unsqueeze(-2) - 2 * inner
    t = inner.clamp(-1, 1).arccos() if distance == "angular" else square.clamp(min=1e-12).sqrt()
    others = ~torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    return (riesz(torch.where(others, t, 1.0), s) * others).sum(-1)[..., :n]


def plain(
    weight: Tensor,
    s: float,
    distance: str,
    half_space: bool,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """What a PyTorch user writes in the dtype of the weight: the Gram matrix and a clamp. The budget's yardstick."""
    unit = weight / (weight.norm(dim=-1, keepdim=True) + EPSILON)
    if half_space:
        unit = torch.cat([unit, -unit], -2)
    others = ~torch.eye(unit.shape[-2], dtype=torch.bool, device=weight.device)
    gram, eps = torch.where(others, multiply(unit, unit.mT), 0.0), torch.finfo(weight.dtype).eps
    t = gram.clamp(eps - 1, 1 - eps).arccos() if distance == "angular" else (2 - 2 * gram).clamp(min=1e-12).sqrt()
    return (riesz(t, s) * others).sum(-1)[..., : weight.shape[-2]]


def gradient(weight: Tensor, upstream: Tensor, *options: object) -> Tensor:
    leaf = weight.detach().double().requires_grad_()
    (per_neuron(leaf, *options) * upstream).sum().backward()
    assert leaf.grad is not None
    return torch.where((leaf == 0).all(-1, keepdim=True), 0.0, leaf.grad)  # by contract


def orthogonal(n: int, s: float, distance: str, half_space: bool) -> float:
    total = per_neuron(torch.eye(n, dtype=torch.float64) * 1e8, s, distance, half_space).sum().item()
    return total * (2 if half_space else 1)


def second_moment(weight: Tensor) -> Tensor:
    unit = unit_rows(weight.double())
    return unit.mT @ unit / weight.shape[-2]


def rank_rule(values: Tensor, energy_ratio: float) -> int:
    """``#{cumsum / total <= ratio} + 1``, value by value."""
    total, running, count = math.fsum(values.tolist()), 0.0, 0
    for value in values.tolist():
        running += value
        count += running / total <= energy_ratio
    return count + 1
