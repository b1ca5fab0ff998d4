"""Overhead of a call: every operation on 8 neurons, beside the plain ways."""

from __future__ import annotations

import pytest

from benchmarks import test_directions, test_energy, test_gram, test_projection
from benchmarks.cases import measure, plan

CALLS = 200
CASES = {
    test_energy.FORWARD: (8, 16),
    test_energy.GRADIENT: (8, 16),
    test_gram.GRAM: (8, 16),
    test_gram.UPDATE: (8, 2),
    test_directions.DIRECTIONS: (8, 16),
    test_projection.PROJECTION: (8, 16),
    test_projection.FACTOR: (8, 16),
}
ROWS = [
    pytest.param(case, *row.values, id=f"{case.name.replace(' ', '_')}-{row.id}", marks=row.marks)
    for case, shape in CASES.items()
    for row in plan(case, [shape], 1)
    if not row.values[0].way.compiled
]


@pytest.mark.parametrize(("case", "row"), ROWS)
def test_overhead(benchmark, case, row, machine):
    measure(benchmark, case, row, machine, calls=CALLS)
