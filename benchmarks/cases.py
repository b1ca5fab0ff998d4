"""Cases of the kernel suites: a case is one operation with several ways; a suite measures every way on every shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import pytest
import torch

from benchmarks.memory import peak
from sphere_kernels import dispatch

SECONDS = 0.2  # per way and turn
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """One way to compute an operation.

    Attributes:
        name: name in tables.
        kind: ``"ours"`` (the choice of ``impl="auto"``), ``"backend"`` (another of ours), ``"plain"``,
            ``"published"``, ``"peer"`` (another library), or ``"limit"`` (the machine's best; no result to check).
        run: called with the arguments of the case.
        tolerance: largest error allowed.
        memory: measure the peak.
        compiled: the first call on a shape compiles, so the second call's peak is measured.
        once: too slow to call again; the result of the timed call is checked.
        skip: the reason why the way cannot run here.
        prepare: turns the case's arguments into ``run``'s; not timed.
        batches: batches per call; tables state the time per batch.
    """

    name: str
    kind: str
    run: Callable[..., Any]
    tolerance: float = 1e-5
    memory: bool = True
    compiled: bool = False
    once: bool = False
    skip: str | None = None
    prepare: Callable[..., tuple[Any, ...]] | None = None
    batches: int = 1

    def arguments(self, case: Case, shape: Shape) -> tuple[Any, ...]:
        """Fresh arguments for ``run``."""
        found = case.arguments(shape)
        return self.prepare(*found) if self.prepare else found


@dataclass(frozen=True)
class Case:
    """One operation.

    Attributes:
        module, name: the case's place, in the module's ``CASES``.
        arguments: fresh arguments for a shape; not timed.
        ways: the ways that fit a shape.
        error: error of a result against fp64; not timed.
        flops, bytes: least work and least traffic of the operation, for a shape.
        tiny: a shape for the warm-up of the memory measurement.
    """

    module: str
    name: str
    arguments: Callable[[Shape], tuple[Any, ...]]
    ways: Callable[[Shape], list[Way]]
    error: Callable[[Any, Shape], float]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape], float]
    tiny: Shape = (8, 8)


@dataclass(frozen=True)
class Row:
    shape: Shape
    turn: int
    way: Way


def ours(op: str, shape: Shape, run: Callable[..., Any], tolerance: float) -> list[Way]:
    """Every implementation of an operation that runs here; the first is the choice of ``impl="auto"``."""
    kinds = ["ours"] + ["backend"] * len(dispatch.PREFERENCE)
    impls = dispatch.available(op, "cpu", torch.float32, shape)
    return [Way(impl, kind, partial(run, impl=impl), tolerance) for impl, kind in zip(impls, kinds, strict=False)]


def plan(case: Case, shapes: Iterable[Shape], turns: int = 3) -> list[Any]:
    """Parameters of a test: the ways of each shape take turns, so that a slow minute of the machine hits every way.

    Backends that ``impl="auto"`` passes over, other libraries and very slow ways take the first turn only.
    """
    rows = [
        Row(shape, turn, way)
        for shape in shapes
        for turn in range(turns)
        for way in case.ways(shape)
        if turn == 0 or not (way.once or way.kind in ("backend", "peer"))
    ]
    return [pytest.param(row, id=_label(row), marks=_marks(row.way)) for row in rows]


def _label(row: Row) -> str:
    name = "".join(c if c.isalnum() else "_" for c in row.way.name)
    return f"{'x'.join(map(str, row.shape))}-{name}-{row.turn}"


def _marks(way: Way) -> list[Any]:
    return [pytest.mark.skip(reason=way.skip)] if way.skip else []


def measure(
    benchmark: Any, case: Case, row: Row, machine: dict[str, float], most: int = 20, calls: int | None = None
) -> None:
    """Check a way against fp64, time the way for `SECONDS` or ``most`` rounds, and note the fields of the row.

    With ``calls``, a round is so many calls on the same arguments: this times the overhead of a call on tiny inputs.
    """
    way, rounds = row.way, 1
    if not way.once:
        result, seconds = _call(case, row)
        error = _checked(case, row, result)
        if seconds < SECONDS or way.compiled:
            _, seconds = _call(case, row)
        rounds = max(1, min(most, int(SECONDS / seconds)))
    if calls:
        result = benchmark.pedantic(way.run, args=way.arguments(case, row.shape), rounds=most, iterations=calls)
    else:
        result = benchmark.pedantic(way.run, setup=lambda: (way.arguments(case, row.shape), {}), rounds=rounds)
    if way.once:
        error = _checked(case, row, result)
    if benchmark.enabled and not calls and way.memory and row.turn == 0:
        benchmark.extra_info["memory_mb"] = round(peak(case.module, case.name, way.name, row.shape), 1)
    benchmark.extra_info.update(
        case=case.name,
        shape=list(row.shape),
        way=way.name,
        kind=way.kind,
        turn=row.turn,
        error=error,
        flops=case.flops(row.shape),
        bytes=case.bytes(row.shape),
        batches=way.batches,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        torch=str(torch.__version__),
        **machine,
    )


def _call(case: Case, row: Row) -> tuple[Any, float]:
    arguments = row.way.arguments(case, row.shape)
    start = perf_counter()
    result = row.way.run(*arguments)
    return result, perf_counter() - start


def _checked(case: Case, row: Row, result: Any) -> float | None:
    """The error of a result, to two digits; fails above the way's tolerance."""
    if row.way.kind == "limit":
        return None
    error = case.error(result, row.shape)
    assert error <= row.way.tolerance, f"{row.way.name}: error {error:.1e} exceeds {row.way.tolerance:.0e}"
    return float(f"{error:.2g}")
