"""Sparse projection: keep an update out of the principal directions of its weight."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.projection import ops
from sphere_kernels.projection.types import LowRankUpdate
from sphere_kernels.projection.validation import check_projection, check_target


@overload
def sparse_projection(
    update: Tensor, directions: PrincipalDirections | Tensor, alpha: float = 0.5, *, impl: str = "auto"
) -> Tensor: ...
@overload
def sparse_projection(
    update: LowRankUpdate, directions: PrincipalDirections | Tensor, alpha: float = 0.5, *, impl: str = "auto"
) -> LowRankUpdate: ...
def sparse_projection(
    update: Tensor | LowRankUpdate,
    directions: PrincipalDirections | Tensor,
    alpha: float = 0.5,
    *,
    impl: str = "auto",
) -> Tensor | LowRankUpdate:
    """Suppress the part of an update that lies in the principal directions: ``update - alpha (update U) U^T``.

    Args:
        update: ``[..., n, d]`` float64, float32, bfloat16 or float16, or a `LowRankUpdate`, of which only the right
            factor changes.
        directions: result of `principal_directions`, or a basis ``U`` with orthonormal columns, ``[d, r]`` or with the
            update's leading dimensions; same device. It is a constant: no gradient flows to it.
        alpha: suppression strength in [0, 1]; 1 removes the component entirely.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        The projected update, in the form and dtype of ``update``; never a view of it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range; an ``impl`` that cannot run.

    Numerics:
        Computed in the widest of fp32, the update's and the basis's dtype, rounded once to the update's dtype.
        Differentiable in the update to any order.

    Source:
        SPHERE, arXiv 2510.01172, sparse space projection.
    """
    basis = check_projection(update, directions, alpha, impl)
    if isinstance(update, LowRankUpdate):
        return LowRankUpdate(update.left, ops.sparse_projection(update.right, basis, float(alpha), impl))
    return ops.sparse_projection(update, basis, float(alpha), impl)


@torch.no_grad()
def apply_projected_update_(
    weight: Tensor,
    update: Tensor | LowRankUpdate,
    directions: PrincipalDirections | Tensor,
    alpha: float = 0.5,
    *,
    impl: str = "auto",
) -> Tensor:
    """Add the projected update to a weight in place.

    Args:
        weight: ``[..., n, d]`` float64, float32, bfloat16 or float16; a Parameter or a strided view (such as the
            transpose of a Conv1D weight) is written through. It must not share memory with the other arguments.
        update: ``[..., n, d]`` or a `LowRankUpdate` of that shape, same device.
        directions, alpha, impl: as for `sparse_projection`.

    Returns:
        ``weight`` itself.

    Raises:
        TypeError, ValueError: as for `sparse_projection`, and for a weight that does not fit; nothing is written then.

    Numerics:
        Computed in chunks of rows, in the widest of fp32 and the dtypes given, and rounded once to the weight's dtype.
        Not differentiable: it runs under ``no_grad``.

    Source:
        SPHERE, arXiv 2510.01172, sparse space projection.
    """
    basis = check_projection(update, directions, alpha, impl)
    check_target(weight, update)
    left, right = (update.left, update.right) if isinstance(update, LowRankUpdate) else (None, update)
    ops.apply_projected_update_(weight.detach(), left, right, basis, float(alpha), impl)
    return weight
