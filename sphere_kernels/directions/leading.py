"""Leading eigenvectors of the second moment of unit rows, from the smaller of its two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sphere_kernels.directions import subspace
from sphere_kernels.directions.small_side import Products, SmallSide, unit_rows
from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace
from sphere_kernels.directions.types import PrincipalDirections


def leading_directions(
    products: Products,
    weight: Tensor,
    energy_ratio: float,
    rank: int | None,
    method: str,
    start: Tensor | None,
    tolerance: float | None,
) -> PrincipalDirections:
    """Directions of ``[..., n, d]``, the products with the weight as a backend computes them."""
    if method == "svd":
        return _from_svd(unit_rows(weight), energy_ratio, rank)
    side = SmallSide.of(weight, products)
    total, longest = trace(side.gram), max(weight.shape[-2:])
    if method == "subspace" or (method == "auto" and subspace.pays(side.gram.shape[-1], start, rank)):
        first = None if start is None else side.from_features(normalize(start, dim=-2).to(side.gram.dtype))
        found = subspace.leading_eigenpairs(side.gram, longest, energy_ratio, rank, first, tolerance)
        if found is not None:
            values, vectors, ranks = found
            return _result(side, vectors, values, ranks, total, "subspace")
    ascending, vectors = torch.linalg.eigh(side.gram)
    values = ascending.flip(-1).clamp_(min=0)
    ranks = choose_rank(values, total, noise_floor(values, longest), energy_ratio, rank)
    leading = vectors[..., vectors.shape[-1] - int(ranks.max()) :].flip(-1)
    return _result(side, leading, values, ranks, total, "eigh")


def _result(
    side: SmallSide, vectors: Tensor, values: Tensor, ranks: Tensor, total: Tensor, method: str
) -> PrincipalDirections:
    leading = values[..., : vectors.shape[-1]]
    own = _own(ranks, leading)
    held = (leading * own).sum(-1, dtype=torch.float64) / total
    return PrincipalDirections(side.to_features(vectors, leading, own), values, ranks, held, method)


def _from_svd(unit: Tensor, energy_ratio: float, rank: int | None) -> PrincipalDirections:
    n, d = unit.shape[-2:]
    _, singular, right = torch.linalg.svd(unit, full_matrices=False)
    values = singular.square() / n
    total = values.double().sum(-1)
    # Singular values are good to eps of the largest, so their squares resolve eigenvalues down to eps^2.
    floor = (singular[..., 0] * max(n, d) * torch.finfo(unit.dtype).eps).square() / n
    ranks = choose_rank(values, total, floor, energy_ratio, rank)
    leading = values[..., : int(ranks.max())]
    own = _own(ranks, leading)
    basis = right.mT[..., : leading.shape[-1]] * own.unsqueeze(-2)
    return PrincipalDirections(basis.contiguous(), values, ranks, (leading.double() * own).sum(-1) / total, "svd")


def _own(ranks: Tensor, leading: Tensor) -> Tensor:
    """bool ``[..., r]``: the columns up to a matrix's own rank."""
    return torch.arange(leading.shape[-1], device=ranks.device) < ranks.unsqueeze(-1)
