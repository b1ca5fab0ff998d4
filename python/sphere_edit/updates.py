"""An update of one weight: a matrix ``[n, d]``, or two factors ``[n, b]`` and ``[b, d]``."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels import LowRankUpdate

Update = Tensor | LowRankUpdate


def factors(update: Update) -> tuple[Tensor | None, Tensor]:
    """Left and right factor, as `HypersphereState.update_` takes them: of a matrix, None and the matrix itself."""
    return (update.left, update.right) if isinstance(update, LowRankUpdate) else (None, update)


def of_factors(left: Tensor | None, right: Tensor) -> Update:
    """Inverse of `factors`."""
    return right if left is None else LowRankUpdate(left, right)


def moved(update: Update, device: torch.device | str) -> Update:
    """The update on another device."""
    left, right = factors(update)
    return of_factors(None if left is None else left.to(device), right.to(device))


def applied(update: Update, keys: Tensor) -> Tensor:
    """The change ``[b, n]`` that the update makes to a map's outputs for ``keys`` ``[b, d]``."""
    left, right = factors(update)
    out = keys @ right.T
    return out if left is None else out @ left.T


def norm(update: Update) -> float:
    """Frobenius norm; for factors, from their small Gram matrices."""
    if isinstance(update, Tensor):
        return float(update.double().norm())
    left, right = update.left.double(), update.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
