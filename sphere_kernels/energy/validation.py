"""Argument checks of the energy."""

from __future__ import annotations

from typing import Any

from sphere_kernels._common import checks

REDUCTIONS = ("sum", "mean", "none")
DISTANCES = ("euclidean", "angular")


def check_energy(weight: Any, s: Any, reduction: Any, distance: Any, half_space: Any, impl: Any) -> None:
    """Check the arguments of `hyperspherical_energy`."""
    checks.matrix("weight", weight)
    check_options(s, distance, half_space)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.impl(impl)


def check_options(s: Any, distance: Any, half_space: Any) -> None:
    """Check what defines the energy of a pair."""
    checks.number("s", s, low=0)
    checks.choice("distance", distance, DISTANCES)
    checks.flag("half_space", half_space)


def ordered_pairs(points: int) -> int:
    """Number of ordered pairs of the points that a mean runs over."""
    if points < 2:
        raise ValueError(f'reduction="mean" needs at least 2 neurons, got {points}')
    return points * (points - 1)
