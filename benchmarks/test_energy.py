"""Hyperspherical energy (s = 1), forward, and forward with backward, against plain PyTorch and KeOps.

Useful flops: n²d for the Gram matrix, by symmetry half of ``torch.mm``'s; 2 n²d more for the gradient.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import energy as plain
from benchmarks.cases import Case, Shape, Way, measure, ours, plan
from sphere_kernels import hyperspherical_energy

MAIN = [(2048, 1024), (4096, 1024), (4096, 4096), (2048, 256), (8192, 64)]
MODELS = [(576, 1536), (1600, 6400)]  # SmolLM2-135M, GPT-2 XL
LARGE = [(4096, 14336), (3584, 18944)]  # LLaMA3-8B, Qwen2.5-7B
GROWTH = [(512, 1024), (1024, 1024), (8192, 1024), (2048, 64), (2048, 512), (2048, 4096)]


@lru_cache(maxsize=1)
def weight(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def exact(shape: Shape) -> float:
    return float(plain.exact(weight(shape)))


@lru_cache(maxsize=1)
def exact_gradient(shape: Shape) -> Tensor:
    return plain.exact_gradient(weight(shape))


def mm(rows: Tensor) -> Tensor:
    return torch.mm(rows, rows.T)


LIMIT = Way("torch.mm", "limit", mm, memory=False)


def gradient(rows: Tensor, impl: str) -> Tensor:
    leaf = rows.detach().requires_grad_()
    (grad,) = torch.autograd.grad(hyperspherical_energy(leaf, impl=impl), leaf)
    return grad


def forward_ways(shape: Shape) -> list[Way]:
    mine = ours("pair_energy", shape, hyperspherical_energy, 1e-7)
    whole = Way("X @ X.T, in place", "plain", plain.gram_in_place)
    half = Way("chunked triangle", "triangle", plain.chunked_triangle)
    if shape in LARGE:
        ways = [mine[0], replace(whole, memory=False), replace(half, memory=False), LIMIT]
        return [replace(way, once=True) for way in ways]
    if shape not in MAIN:
        return [mine[0], whole, Way("cdist", "plain", plain.cdist), half, LIMIT]
    ways = [
        *mine,
        whole,
        half,
        Way("cdist", "plain", plain.cdist),
        Way("pdist", "plain", plain.pdist, memory=False),
        Way("chunked", "plain", plain.chunked),
        Way("torch.compile", "plain", plain.compiled, compiled=True, memory=shape in MAIN[:1]),
        LIMIT,
    ]
    if shape == (8192, 64):  # KeOps is best at small d
        missing = None if importlib.util.find_spec("pykeops") else "pykeops is not installed"
        ways.append(Way("KeOps", "peer", plain.keops, memory=False, skip=missing))
    return ways


def gradient_ways(shape: Shape) -> list[Way]:
    return [
        *ours("pair_energy_backward", shape, gradient, 1e-5),
        Way("X @ X.T, autograd", "plain", plain.gradient_gram),
        Way("cdist, autograd", "plain", plain.gradient_cdist),
        Way("analytic, in place", "plain", plain.gradient_function),
        Way("torch.compile", "plain", plain.gradient_compiled, compiled=True, memory=shape in MAIN[:1]),
        Way("chunked triangle", "triangle", plain.gradient_triangle),
        LIMIT,
    ]


def energy_error(energy: Tensor, shape: Shape) -> float:
    return abs(float(energy) / exact(shape) - 1)


def gradient_error(grad: Tensor, shape: Shape) -> float:
    wanted = exact_gradient(shape)
    return float((grad - wanted).norm() / wanted.norm())


FORWARD = Case(
    module=__name__,
    name="energy",
    arguments=lambda shape: (weight(shape),),
    ways=forward_ways,
    error=energy_error,
    flops=lambda shape: shape[0] ** 2 * shape[1],
    bytes=lambda shape: 4 * shape[0] * shape[1],
)
GRADIENT = Case(
    module=__name__,
    name="energy with gradient",
    arguments=lambda shape: (weight(shape),),
    ways=gradient_ways,
    error=gradient_error,
    flops=lambda shape: 3 * shape[0] ** 2 * shape[1],
    bytes=lambda shape: 8 * shape[0] * shape[1],
)
CASES = {case.name: case for case in (FORWARD, GRADIENT)}


@pytest.mark.parametrize("row", plan(FORWARD, MAIN) + plan(FORWARD, MODELS + GROWTH + LARGE, 1))
def test_forward(benchmark, row, machine):
    measure(benchmark, FORWARD, row, machine)


@pytest.mark.parametrize("row", plan(GRADIENT, MAIN[:1]) + plan(GRADIENT, MODELS[:1], 1))
def test_gradient(benchmark, row, machine):
    measure(benchmark, GRADIENT, row, machine)
