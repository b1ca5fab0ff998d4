"""Principal directions that hold half of the energy, against the published way and better plain ways.

The limit is ``eigh`` of a Gram matrix that is computed before. A second case renews the directions after a batch of
edits, with the Gram matrix computed before, too: our tracking against LAPACK's ``eigh`` of the same matrix.
"""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import directions as plain
from benchmarks.baselines.energy import unit_rows
from benchmarks.cases import Case, Shape, Way, measure, ours, plan
from benchmarks.layer import EDITS, Layer
from sphere_kernels import principal_directions
from sphere_kernels.streaming import HypersphereState

RATIO = 0.5
SHAPES = [(576, 1536), (1024, 3584)]
LARGE = [(2048, 7168), (1600, 6400)]  # the second shape is GPT-2 XL's
HUGE = (4096, 14336)  # Llama-3-8B's
WIDEST = 1.03  # most directions of a tracked basis, over the least number
PUBLISHED = {*SHAPES, (2048, 7168)}  # each large shape takes half a minute


@lru_cache(maxsize=1)
def weight(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def unit_gram(shape: Shape) -> Tensor:
    unit = unit_rows(weight(shape))
    return unit @ unit.T


@lru_cache(maxsize=1)
def spectrum(shape: Shape) -> Tensor:
    return plain.exact_spectrum(weight(shape))


def directions(rows: Tensor, impl: str) -> Tensor:
    return principal_directions(rows, RATIO, impl=impl).basis


def ways(shape: Shape) -> list[Way]:
    found = [
        *ours("principal_directions", shape, directions, 1e-5),
        Way("eigh, small side", "plain", lambda rows: plain.small_side(rows, RATIO)),
        Way("eigh alone", "limit", lambda rows: torch.linalg.eigh(unit_gram(tuple(rows.shape))), memory=False),
    ]
    if shape == SHAPES[0]:
        found.append(Way("svd", "plain", lambda rows: plain.svd(rows, RATIO)))
    if shape in PUBLISHED:
        slow = shape in LARGE
        published = Way("published", "published", lambda rows: plain.published(rows, RATIO), memory=not slow, once=slow)
        found.append(published)
    return found


def error(basis: Tensor, shape: Shape) -> float:
    """Error of a basis: energy missed, against the most that as many directions can hold, or distance from orthonormal.

    Single vectors are ill-conditioned, and so is the span at its edge; the energy held is not.
    """
    values, r = spectrum(shape), basis.shape[1]
    assert abs(r - plain.rank(values, RATIO)) <= 1
    basis = basis.double()
    missed = 1 - (unit_rows(weight(shape).double()) @ basis).square().sum() / values[:r].sum()
    skew = (basis.T @ basis - torch.eye(r)).abs().max()
    return float(torch.maximum(missed.abs(), skew))


DIRECTIONS = Case(
    module=__name__,
    name="directions",
    arguments=lambda shape: (weight(shape),),
    ways=ways,
    error=error,
    flops=lambda shape: shape[0] ** 2 * shape[1],
    bytes=lambda shape: 4 * shape[0] * shape[1],
)


def edited(shape: Shape, how: str) -> tuple[HypersphereState]:
    """A state after a batch, with directions from before the batch, not yet renewed."""
    layer = Layer(*shape)
    state = HypersphereState(layer.weight, energy_ratio=RATIO, directions=how)
    right = torch.randn(EDITS, shape[1], generator=torch.Generator().manual_seed(1)) * 0.13 / shape[1] ** 0.5
    state.update_(layer.left(0), right)
    return (state,)


def renewed(state: HypersphereState) -> HypersphereState:
    assert (state.rank > 0).all()  # the access renews the directions
    return state


def renewals(shape: Shape) -> list[Way]:
    slow = shape == HUGE
    made = partial(Way, run=renewed, tolerance=1e-5, memory=not slow)
    return [
        made("tracked", "ours", prepare=partial(edited, how="tracked")),
        made("eigh", "plain", prepare=partial(edited, how="exact"), once=slow),
    ]


def renewal_error(state: HypersphereState, shape: Shape) -> float:
    """Distance of the basis from orthonormal; fails if the basis does not hold the ratio in fp64, or is too wide."""
    basis, unit = state.directions.basis.double(), unit_rows(state.master.double())
    values = torch.linalg.eigvalsh(unit @ unit.T).flip(0)
    assert state.renewal in (None, "tracked"), state.renewal
    assert (unit @ basis).square().sum() > RATIO * values.sum()
    assert basis.shape[1] <= WIDEST * plain.rank(values, RATIO)
    return float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())


RENEWAL = Case(
    module=__name__,
    name="directions renewed",
    arguments=lambda shape: (shape,),
    ways=renewals,
    error=renewal_error,
    flops=lambda shape: 0.6 * shape[0] ** 3,  # one product with about 0.3 n directions
    bytes=lambda shape: 4 * shape[0] ** 2,
    tiny=(64, 128),
)
CASES = {c.name: c for c in (DIRECTIONS, RENEWAL)}
RENEWED = plan(RENEWAL, [*SHAPES, LARGE[0]], 3) + plan(RENEWAL, [HUGE], 1)


@pytest.mark.parametrize("row", plan(DIRECTIONS, SHAPES, 2) + plan(DIRECTIONS, LARGE, 1))
def test_directions(benchmark, row, machine):
    measure(benchmark, DIRECTIONS, row, machine)


@pytest.mark.parametrize("row", RENEWED)
def test_renewed_directions(benchmark, row, machine):
    measure(benchmark, RENEWAL, row, machine)
