"""Leading eigenvectors of the second moment of unit rows, from the smaller of its two Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sphere_kernels.directions import subspace
from sphere_kernels.directions.small_side import SmallSide, spread, unit_rows
from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace
from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.products import Products


@dataclass(frozen=True)
class Leading:
    """Leading eigenvectors of a small side, not yet brought to features.

    Attributes:
        side: what they belong to.
        vectors: ``[..., m, r]``, r the largest rank.
        values: ``[..., k]``, descending eigenvalues, at least r of them.
        rank: int64 ``[...]``.
        total: ``[...]`` fp64, the trace.
        method: what computed them.
    """

    side: SmallSide
    vectors: Tensor
    values: Tensor
    rank: Tensor
    total: Tensor
    method: str

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        leading = self.values[..., : self.vectors.shape[-1]]
        return self.vectors, leading, _own(self.rank, leading)

    def directions(self) -> PrincipalDirections:
        """The same as directions of the weight."""
        basis = self.side.to_features(*self._parts)
        return PrincipalDirections(basis, self.values, self.rank, self.energy_ratio, self.method)

    @property
    def energy_ratio(self) -> Tensor:
        """Share of the trace that they hold, fp64 ``[...]``."""
        _, leading, own = self._parts
        return (leading * own).sum(-1, dtype=torch.float64) / self.total

    def coefficients(self) -> Tensor:
        """``[..., n, r]``: with them the directions are ``W^T coefficients``, as orthonormal as `spread` allows."""
        return self.side.coefficients(*self._parts)

    def spread(self) -> float:
        """Largest eigenvalue over the smallest that counts, in the worst of the matrices."""
        return spread(*self._parts[1:])


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
    if method == "subspace" or (method == "auto" and subspace.pays(side.gram.shape[-1], start, rank)):
        first = None if start is None else side.from_features(normalize(start, dim=-2).to(side.gram.dtype))
        found = subspace.leading_eigenpairs(side.gram, side.longest, energy_ratio, rank, first, tolerance)
        if found is not None:
            values, vectors, ranks = found
            return Leading(side, vectors, values, ranks, trace(side.gram), "subspace").directions()
    return by_eigh(side, energy_ratio, rank).directions()


def by_eigh(side: SmallSide, energy_ratio: float, rank: int | None) -> Leading:
    """By LAPACK's whole decomposition of the small side."""
    total = trace(side.gram)
    ascending, vectors = torch.linalg.eigh(side.gram)
    values = ascending.flip(-1).clamp_(min=0)
    ranks = choose_rank(values, total, noise_floor(values, side.longest), energy_ratio, rank)
    leading = vectors[..., vectors.shape[-1] - int(ranks.max()) :].flip(-1)
    return Leading(side, leading, values, ranks, total, "eigh")


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
