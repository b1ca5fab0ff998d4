"""``W += (R X) (I - alpha U U^T)`` in place: ``W [n, d]``, ``R [n, b]``, ``X [b, d]``, ``U [d, r]``, fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def published(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """Form the update and ``P = I - alpha U U^T``, then multiply: two or three d x d and two n x d."""
    projector = torch.eye(len(basis)) - alpha * (basis @ basis.T)
    weight += (left @ right) @ projector
    return weight


def dense_update(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """Form the update, then project by thin products: n x d and n x r."""
    update = left @ right
    weight += update.addmm_(update @ basis, basis.T, alpha=-alpha)
    return weight


def thin(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """Project only the right factor, then one ``addmm_``: b x d and b x r."""
    return weight.addmm_(left, factor(right, basis, alpha))


def factor(right: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """The projected right factor: b x d and b x r."""
    return torch.addmm(right, right @ basis, basis.T, alpha=-alpha)


def exact(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """The yardstick: the new weight in fp64."""
    weight, left, right, basis = (t.double() for t in (weight, left, right, basis))
    return weight + left @ factor(right, basis, alpha)
