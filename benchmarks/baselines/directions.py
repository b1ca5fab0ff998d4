"""Principal directions ``[d, r]`` of the unit rows of ``[n, d]`` fp32: the published way and better plain ways."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines.energy import unit_rows


def published(weight: Tensor, energy_ratio: float) -> Tensor:
    """``eigh`` of ``C = X^T X / n``, sorted: three or four d x d."""
    unit = unit_rows(weight)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    values, order = values.sort(descending=True)
    return vectors[:, order][:, : rank(values, energy_ratio)]


def small_side(weight: Tensor, energy_ratio: float) -> Tensor:
    """``eigh`` of ``X X^T``, then ``X^T V L^-1/2``: two or three n x n."""
    unit = unit_rows(weight)
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    values, vectors = values.flip(0), vectors.flip(1)
    r = rank(values, energy_ratio)
    return unit.T @ (vectors[:, :r] * values[:r].rsqrt())


def svd(weight: Tensor, energy_ratio: float) -> Tensor:
    """``svd`` of X: n x d and two or three n x n."""
    _, values, vectors = torch.linalg.svd(unit_rows(weight), full_matrices=False)
    return vectors[: rank(values.square(), energy_ratio)].T


def rank(values: Tensor, energy_ratio: float) -> int:
    """``#{cumsum / total <= ratio} + 1`` of descending eigenvalues."""
    return int((values.cumsum(0) / values.sum() <= energy_ratio).sum()) + 1


def exact_spectrum(weight: Tensor) -> Tensor:
    """The yardstick: descending eigenvalues of ``X X^T`` in fp64."""
    unit = unit_rows(weight.double())
    return torch.linalg.eigvalsh(unit @ unit.T).flip(0)
