"""A batch of 100 edits of one layer: solve, directions, projection, write, energy, history; against the published way.

The layer is in the middle of a long run: our solver keeps the whole inverse, its most expensive form. The directions
belong to the current weight. They are renewed with every batch or with every tenth (the published way has the first
only), by an eigendecomposition, or tracked in every batch. Times are per batch; over ten batches the mean.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import gram, streaming
from benchmarks.baselines.energy import exact as exact_energy
from benchmarks.cases import Case, Shape, Way, measure, plan
from benchmarks.layer import ALPHA, EDITS, RATIO, RIDGE, Engine, Layer
from sphere_kernels.streaming import RecursiveLeastSquares

SHAPES = [(576, 1536), (1024, 3584), (2048, 7168)]
HISTORY, SELDOM = 20, 10
Batches = list[tuple[Tensor, ...]]  # keys, residuals, and keys for the history if they differ


@dataclass(frozen=True)
class Outcome:
    """The result of a way."""

    weight: Tensor
    energy: float
    batches: int


class Setting:
    """A layer after `HISTORY` batches; the state that a way needs is made on first use."""

    def __init__(self, shape: Shape) -> None:
        self.layer = Layer(*shape)
        self.past = [self.layer.keys(i) for i in range(HISTORY)]
        later = range(HISTORY, HISTORY + SELDOM)
        self.batches: Batches = [(self.layer.keys(i), self.layer.left(i)) for i in later]
        self.twice: Batches = [(*batch, 1.01 * batch[0]) for batch in self.batches]


@lru_cache(maxsize=1)
def setting(shape: Shape) -> Setting:
    return Setting(shape)


@lru_cache(maxsize=1)
def solver(shape: Shape) -> RecursiveLeastSquares:
    made = RecursiveLeastSquares(RIDGE, shape[1], setting(shape).layer.null_space, form="full")
    for keys in setting(shape).past:
        made.commit(keys)
    return made


@lru_cache(maxsize=1)
def exact_inverse(shape: Shape) -> Tensor:
    """``(ridge I + P C P)^-1`` in fp64."""
    removed = setting(shape).layer.removed.double()
    keys = torch.cat(setting(shape).past).double()
    keys -= keys @ removed @ removed.T
    system = keys.T @ keys
    system.diagonal().add_(RIDGE)
    return torch.cholesky_inverse(torch.linalg.cholesky(system))


@lru_cache(maxsize=1)
def dense(shape: Shape) -> tuple[Tensor, Tensor]:
    """The published projector and history, ``[d, d]`` each."""
    removed, keys = setting(shape).layer.removed, torch.cat(setting(shape).past)
    return torch.eye(shape[1]) - removed @ removed.T, keys.T @ keys


@lru_cache(maxsize=1)
def exact(shape: Shape) -> dict[int, Outcome]:
    """Outcomes in fp64 after one batch and after `SELDOM`, with the directions of the first."""
    layer, found = setting(shape).layer, {}
    inverse = exact_inverse(shape).clone()
    way = streaming.Streamed(
        layer.weight.double(), layer.removed.double(), inverse, RATIO, ALPHA, SELDOM, update=gram.exact
    )
    for number, batch in enumerate(setting(shape).batches, 1):
        way.batch(*(t.double() for t in batch))
        if number in (1, SELDOM):
            found[number] = Outcome(way.weight.clone(), float(exact_energy(way.weight)), number)
    return found


def edit(way: Engine | streaming.Published | streaming.Streamed, batches: Batches) -> Outcome:
    for batch in batches:
        energy = way.batch(*batch)
    return Outcome(way.weight, energy, len(batches))


def ours(shape: Shape, batches: int, twice: bool = False) -> tuple[Engine, Batches]:
    stream = setting(shape).twice if twice else setting(shape).batches
    return Engine(setting(shape).layer.weight.clone(), deepcopy(solver(shape)), batches), stream[:batches]


def tracked(shape: Shape) -> tuple[Engine, Batches]:
    """Our engine in the middle of a run, just after an earlier batch has changed the weight."""
    layer, before = setting(shape).layer, HISTORY - 1
    left, right = layer.left(before), solver(shape).solve(setting(shape).past[before])
    engine = Engine(layer.weight - left @ right, deepcopy(solver(shape)), 1, "tracked")
    engine.state.update_(left, right)
    return engine, setting(shape).batches[:1]


def published(shape: Shape) -> tuple[streaming.Published, Batches]:
    projector, history = dense(shape)
    solves = streaming.AlphaEdit(projector, history.clone(), RIDGE)
    way = streaming.Published(setting(shape).layer.weight.clone(), solves, RATIO, ALPHA)
    return way, setting(shape).batches[:1]


def streamed(shape: Shape, batches: int, basis: bool) -> tuple[streaming.Streamed, Batches]:
    layer, inverse = setting(shape).layer, exact_inverse(shape).float()
    way = streaming.Streamed(layer.weight.clone(), layer.removed, inverse, RATIO, ALPHA, batches, basis)
    return way, setting(shape).batches[:batches]


def ways(shape: Shape, batches: int, tracks: bool = False) -> list[Way]:
    slow = shape == SHAPES[-1]  # takes most of a minute
    made = partial(Way, run=edit, tolerance=1e-4, batches=batches)
    exact_ours = made("ours", "backend" if tracks else "ours", prepare=partial(ours, batches=batches))
    found = [
        *([made("tracked", "ours", prepare=tracked, tolerance=1e-2)] if tracks else []),
        exact_ours,
        made("plain streaming", "plain", prepare=partial(streamed, batches=batches, basis=True)),
        made("plain streaming without U", "plain", prepare=partial(streamed, batches=batches, basis=False)),
        Way("published", "published", edit, tolerance=1e-2, memory=not slow, once=slow, prepare=published),
    ]
    if batches == 1 and not tracks:
        found.append(made("second keys", "backend", prepare=partial(ours, batches=batches, twice=True)))
    return found


def error(outcome: Outcome, shape: Shape) -> float:
    """The larger of two errors: of the weight, relative to the movement by the batches, and of the energy."""
    wanted = exact(shape)[outcome.batches]
    moved = wanted.weight - setting(shape).layer.weight
    off = float((outcome.weight - wanted.weight).norm() / moved.norm())
    return max(off, abs(outcome.energy / wanted.energy - 1))


def edits_of(name: str, batches: int, tracks: bool = False) -> Case:
    return Case(
        module=__name__,
        name=name,
        arguments=lambda shape: (shape,),
        ways=partial(ways, batches=batches, tracks=tracks),
        error=error,
        flops=lambda shape: 2 * EDITS * (3 * shape[0] * shape[1] + shape[0] ** 2 + 2 * shape[1] ** 2),
        bytes=lambda shape: 4 * (3 * shape[0] * shape[1] + 2 * shape[0] ** 2 + 2 * shape[1] ** 2),
        tiny=(64, 128),
    )


ALWAYS = edits_of("streaming, refreshed every batch", 1)
TENTH = edits_of("streaming, refreshed every 10 batches", SELDOM)
TRACKED = edits_of("streaming, tracked in every batch", 1, tracks=True)
CASES = {c.name: c for c in (ALWAYS, TENTH, TRACKED)}
ROWS = [
    pytest.param(case, *row.values, id=f"{name}-{row.id}")
    for shape in SHAPES
    for name, case in (("always", ALWAYS), ("tenth", TENTH), ("tracked", TRACKED))
    for row in plan(case, [shape], 5)
]


@pytest.mark.parametrize(("case", "row"), ROWS)
def test_streaming(benchmark, case, row, machine):
    measure(benchmark, case, row, machine)
