"""The Gram matrix, and a low-rank update with the energy of every neuron, against plain PyTorch.

Useful flops of the update: 2 n²b, for one of two symmetric products; useful bytes: M read and written once.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import gram as plain
from benchmarks.cases import Case, Shape, Way, measure, ours, plan
from sphere_kernels import gram, gram_update_energy_

WEIGHTS = [(2048, 1024), (4096, 1024), (1600, 6400)]
UPDATES = [(4096, 100), (4096, 10), (1600, 100), (576, 100)]  # n neurons, b edits
FEATURES = 1024
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def weight(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def exact(shape: Shape) -> Tensor:
    rows = weight(shape).double()
    return rows @ rows.T


@lru_cache(maxsize=1)
def factors(shape: Shape) -> Factors:
    n, b = shape
    rows = weight((n, FEATURES))
    left, right = torch.randn(n, b) / b, torch.randn(b, FEATURES)
    return rows @ rows.T, left, rows @ right.T, right @ right.T


@lru_cache(maxsize=1)
def exact_update(shape: Shape) -> tuple[Tensor, Tensor]:
    return plain.exact(*factors(shape))


def copied(shape: Shape) -> Factors:
    matrix, left, cross, inner = factors(shape)
    return matrix.clone(), left, cross, inner


def update(matrix: Tensor, left: Tensor, cross: Tensor, inner: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return matrix, gram_update_energy_(matrix, left, cross, inner, impl=impl)


def gram_ways(shape: Shape) -> list[Way]:
    return [
        *ours("gram", shape, gram, 1e-6),
        Way("X @ X.T", "plain", lambda rows: rows @ rows.T),
    ]


def update_ways(shape: Shape) -> list[Way]:
    n, _ = shape
    return [
        *ours("gram_update_energy_", (n, n), update, 1e-6),
        Way("addmm, kept buffer", "plain", plain.addmm),
        Way("baddbmm, kept buffer", "plain", plain.baddbmm),
        Way("addmm, chunked", "plain", plain.chunked),
        Way("chunked, addmm with it", "plain", plain.chunked_both),
        Way("torch.compile", "plain", plain.compiled, compiled=True, memory=shape in UPDATES[:1]),
    ]


def gram_error(matrix: Tensor, shape: Shape) -> float:
    wanted = exact(shape)
    return float((matrix - wanted).abs().max() / wanted.max())


def update_error(result: tuple[Tensor, Tensor], shape: Shape) -> float:
    """The larger of two errors: of M, relative to the largest entry, and of the energies."""
    (matrix, energies), (wanted, wanted_energies) = result, exact_update(shape)
    off = (matrix - wanted).abs().max() / wanted.max()
    return float(torch.maximum(off, (energies / wanted_energies - 1).abs().max()))


GRAM = Case(
    module=__name__,
    name="gram",
    arguments=lambda shape: (weight(shape),),
    ways=gram_ways,
    error=gram_error,
    flops=lambda shape: shape[0] ** 2 * shape[1],
    bytes=lambda shape: 4 * shape[0] * (shape[0] + shape[1]),
)
UPDATE = Case(
    module=__name__,
    name="gram update with energy",
    arguments=copied,
    ways=update_ways,
    error=update_error,
    flops=lambda shape: 2 * shape[0] ** 2 * shape[1],
    bytes=lambda shape: 8 * shape[0] ** 2,
)
CASES = {case.name: case for case in (GRAM, UPDATE)}


@pytest.mark.parametrize("row", plan(GRAM, WEIGHTS, 2))
def test_gram(benchmark, row, machine):
    measure(benchmark, GRAM, row, machine)


@pytest.mark.parametrize("row", plan(UPDATE, UPDATES[:1]) + plan(UPDATE, UPDATES[1:], 1))
def test_update(benchmark, row, machine):
    measure(benchmark, UPDATE, row, machine)
