"""Argument checks of the projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sphere_kernels._common import checks
from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.projection.types import LowRankUpdate


def check_projection(update: Any, directions: Any, alpha: Any, impl: Any) -> Tensor:
    """Check the arguments of `sparse_projection`; returns the basis, a constant of the operation."""
    basis = directions.basis if isinstance(directions, PrincipalDirections) else directions
    factor = update.right if isinstance(update, LowRankUpdate) else update
    name = "update.right" if isinstance(update, LowRankUpdate) else "update"
    checks.matrix(name, factor)
    checks.matrix("directions", basis)
    if basis.shape[-2] != factor.shape[-1]:
        raise ValueError(
            f"directions must have {factor.shape[-1]} rows, one per column of {name} {list(factor.shape)}, "
            f"got shape {list(basis.shape)}"
        )
    if basis.ndim > 2 and basis.shape[:-2] != factor.shape[:-2]:
        raise ValueError(
            f"directions must be [d, r] or have the leading dimensions {list(factor.shape[:-2])} of {name}, "
            f"got shape {list(basis.shape)}"
        )
    checks.same_device("directions", basis, name, factor)
    checks.number("alpha", alpha, low=0, high=1)
    checks.impl(impl)
    return basis.detach()


def check_target(weight: Any, update: Tensor | LowRankUpdate) -> None:
    """Check that ``weight`` can take ``update`` in place."""
    checks.matrix("weight", weight)
    if update.shape != weight.shape:
        raise ValueError(f"update must have the shape of weight, {list(weight.shape)}, got {list(update.shape)}")
    factor = update.right if isinstance(update, LowRankUpdate) else update
    checks.same_device("update", factor, "weight", weight)
    checks.writable("weight", weight)
