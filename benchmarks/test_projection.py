"""An update of rank 100 projected and written into the weight, against the published way and better plain ways.

Useful flops: the projection of the right factor, and its product with the left factor. Useful bytes: W read and written
once. For the projection alone: the factor read and written, the basis read once.
"""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import projection as plain
from benchmarks.cases import Case, Shape, Way, measure, ours, plan
from sphere_kernels import LowRankUpdate, apply_projected_update_, sparse_projection

ALPHA, EDITS = 0.5, 100
SHAPES = [(576, 1536), (1024, 3584), (2048, 7168)]
LARGE = [(4096, 14336)]  # LLaMA3-8B; the published way would take minutes
Factors = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def factors(shape: Shape) -> Factors:
    """Weight, left and right factor, and a basis of n / 4 directions: about as many hold half of the energy here."""
    n, d = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(n, d), (n, EDITS), (EDITS, d), (d, max(1, n // 4))]
    weight, left, right, span = (torch.randn(size, generator=generator) for size in sizes)
    return weight, left / EDITS, right, torch.linalg.qr(span)[0]


@lru_cache(maxsize=1)
def exact(shape: Shape) -> Tensor:
    return plain.exact(*factors(shape), ALPHA)


def copied(shape: Shape) -> Factors:
    weight, left, right, basis = factors(shape)
    return weight.clone(), left, right, basis


def apply(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, impl: str) -> Tensor:
    return apply_projected_update_(weight, LowRankUpdate(left, right), basis, ALPHA, impl=impl)


def project(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, impl: str) -> Tensor:
    return sparse_projection(LowRankUpdate(left, right), basis, ALPHA, impl=impl).right


def projected(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor) -> Tensor:
    return plain.factor(right, basis, ALPHA)


def factor_ways(shape: Shape) -> list[Way]:
    return [*ours("sparse_projection", shape, project, 1e-6), Way("thin products", "plain", projected)]


def ways(shape: Shape) -> list[Way]:
    mine = ours("apply_projected_update_", shape, apply, 1e-5)
    thin = Way("thin factor", "plain", partial(plain.thin, alpha=ALPHA))
    if shape in LARGE:
        return [mine[0], thin]
    dense = Way("dense update", "plain", partial(plain.dense_update, alpha=ALPHA))
    return [*mine, thin, dense, Way("published", "published", partial(plain.published, alpha=ALPHA))]


def error(weight: Tensor, shape: Shape) -> float:
    """Error of the new weight, relative to the size of the update."""
    wanted = exact(shape)
    return float((weight - wanted).norm() / (wanted - factors(shape)[0]).norm())


def factor_error(right: Tensor, shape: Shape) -> float:
    _, _, before, basis = (t.double() for t in factors(shape))
    wanted = plain.factor(before, basis, ALPHA)
    return float((right - wanted).norm() / wanted.norm())


PROJECTION = Case(
    module=__name__,
    name="projection",
    arguments=copied,
    ways=ways,
    error=error,
    flops=lambda shape: 2 * EDITS * shape[1] * (shape[0] + 2 * (shape[0] // 4)),
    bytes=lambda shape: 8 * shape[0] * shape[1],
)
FACTOR = Case(
    module=__name__,
    name="projection alone",
    arguments=factors,
    ways=factor_ways,
    error=factor_error,
    flops=lambda shape: 4 * EDITS * shape[1] * (shape[0] // 4),
    bytes=lambda shape: 4 * shape[1] * (2 * EDITS + shape[0] // 4),
)
CASES = {case.name: case for case in (PROJECTION, FACTOR)}


@pytest.mark.parametrize("row", plan(PROJECTION, SHAPES) + plan(PROJECTION, LARGE, 1))
def test_projection(benchmark, row, machine):
    measure(benchmark, PROJECTION, row, machine)


@pytest.mark.parametrize("row", plan(FACTOR, SHAPES, 2))
def test_factor(benchmark, row, machine):
    measure(benchmark, FACTOR, row, machine)
