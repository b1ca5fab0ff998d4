"""Leading eigenvectors of the second moment of unit rows, from the smaller of its two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace
from sphere_kernels.directions.subspace import leading_eigenpairs
from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.dispatch import register


@register("principal_directions", "reference")
def principal_directions(unit: Tensor, energy_ratio: float, rank: int | None, method: str) -> PrincipalDirections:
    """Directions of unit rows ``[..., n, d]``."""
    n, d = unit.shape[-2:]
    if method == "svd":
        return _from_svd(unit, energy_ratio, rank)
    gram = (unit @ unit.mT if n <= d else unit.mT @ unit) / n
    found = leading_eigenpairs(gram, max(n, d), energy_ratio, rank) if method == "subspace" else None
    if found is None:
        method = "eigh"
        values, vectors = torch.linalg.eigh(gram)
        found = values.flip(-1).clamp(min=0), vectors.flip(-1)
    values, vectors = found
    total = trace(gram)
    ranks = choose_rank(values, total, noise_floor(values, max(n, d)), energy_ratio, rank)
    if n <= d:
        vectors = _to_features(unit, vectors, ranks)
    return _result(vectors, values[..., : int(ranks.max())] if method == "subspace" else values, ranks, total, method)


def _to_features(unit: Tensor, vectors: Tensor, ranks: Tensor) -> Tensor:
    """Orthonormal ``U^T V L^-1/2``: the columns of ``U^T V`` are orthogonal already, QR scales and polishes them."""
    vectors = vectors[..., : int(ranks.max())]
    return torch.linalg.qr(unit.mT @ (vectors * _own(ranks, vectors))).Q


def _from_svd(unit: Tensor, energy_ratio: float, rank: int | None) -> PrincipalDirections:
    n, d = unit.shape[-2:]
    _, singular, right = torch.linalg.svd(unit, full_matrices=False)
    values = singular.square() / n
    total = values.double().sum(-1)
    # Singular values are good to eps of the largest, so their squares resolve eigenvalues down to eps^2.
    floor = (singular[..., 0] * max(n, d) * torch.finfo(unit.dtype).eps).square() / n
    ranks = choose_rank(values, total, floor, energy_ratio, rank)
    return _result(right.mT, values, ranks, total, "svd")


def _own(ranks: Tensor, columns: Tensor) -> Tensor:
    """``[..., 1, r]``: 1 for the columns up to a matrix's own rank, 0 past it."""
    index = torch.arange(columns.shape[-1], device=ranks.device)
    return (index < ranks.unsqueeze(-1)).unsqueeze(-2).to(columns.dtype)


def _result(vectors: Tensor, values: Tensor, ranks: Tensor, total: Tensor, method: str) -> PrincipalDirections:
    basis = vectors[..., : int(ranks.max())]
    own = _own(ranks, basis)
    held = (values[..., : basis.shape[-1]].double() * own.squeeze(-2)).sum(-1) / total
    return PrincipalDirections((basis * own).contiguous(), values, ranks, held, method)
