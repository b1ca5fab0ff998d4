"""Leading eigenvectors of the second moment of unit rows, from the smaller of its two Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sphere_kernels._products import Products
from sphere_kernels.directions import subspace, tracked
from sphere_kernels.directions.small_side import SmallSide, spread, unit_rows
from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace
from sphere_kernels.directions.types import PrincipalDirections


@dataclass(frozen=True)
class Leading:
    """Leading directions on a small side, not yet brought to features.

    Attributes:
        side: what they belong to.
        vectors: ``[..., m, r]``, r the largest rank: eigenvectors; or, where there is a ``mix``, ``[..., m, k]``.
        values: ``[..., j]``, descending eigenvalues, at least r of them.
        rank: int64 ``[...]``.
        total: ``[...]`` fp64, the trace.
        method: what computed them.
        mix: ``[..., k, r]`` or None: for few rows, the directions are ``U_hat^T vectors mix``, see `tracked.track`.
        block: ``[..., m, k']`` or None: what to track the next ones from.
    """

    side: SmallSide
    vectors: Tensor
    values: Tensor
    rank: Tensor
    total: Tensor
    method: str
    mix: Tensor | None = None
    block: Tensor | None = None

    @property
    def _counting(self) -> tuple[Tensor, Tensor]:
        """The values of the directions, and which of them are within a matrix's own rank."""
        r = (self.vectors if self.mix is None else self.mix).shape[-1]
        leading = self.values[..., :r]
        return leading, _own(self.rank, leading)

    def directions(self) -> PrincipalDirections:
        """The same as directions of the weight."""
        leading, own = self._counting
        held = self.energy_ratio
        if self.mix is None:
            basis = self.side.to_features(self.vectors, leading, own)
            return PrincipalDirections(basis, self.values, self.rank, held, self.method, held)
        assert self.block is not None
        ahead = self.block[..., : leading.shape[-1]]  # G mixed leading^-1/2
        mixed = self.side.products.matmul(self.vectors, self.mix)
        length = torch.linalg.vector_norm(mixed, dim=-2)
        root = leading.sqrt().unsqueeze(-2)
        off = torch.linalg.vector_norm(ahead * root - mixed * root.square(), dim=-2)
        residual = torch.where(own, off / length, 0)
        basis = self.side.to_features(mixed * root if self.side.wide else ahead, leading, own)
        return PrincipalDirections(basis, self.values, self.rank, held, self.method, self.energy_bound, residual)

    @property
    def energy_ratio(self) -> Tensor:
        """Share of the trace that they hold, fp64 ``[...]``."""
        leading, own = self._counting
        return (leading * own).sum(-1, dtype=torch.float64) / self.total

    @property
    def energy_bound(self) -> Tensor:
        """Share of the trace that as many directions hold at most, fp64 ``[...]``."""
        held = self.energy_ratio
        return held if self.mix is None else torch.maximum(tracked.most_held(self.side, self.rank), held)

    def within(self, combined: Tensor) -> Tensor:
        """For ``[..., b, n]``, combinations of the rows of a weight with few: the combinations of their components
        along the directions, as orthonormal as `spread` allows."""
        matmul = self.side.products.matmul
        leading, own = self._counting
        if self.mix is None:
            coefficients = self.side.coefficients(self.vectors, leading, own)
            return matmul(matmul(combined, coefficients), coefficients.mT)
        scale, mix = self.side.scale.mT, self.mix * own.unsqueeze(-2)
        inside = matmul(matmul(matmul(combined * scale, self.vectors), mix), mix.mT)
        return matmul(inside, self.vectors.mT).mul_(scale)

    def spread(self) -> float:
        """Largest eigenvalue over the smallest that counts, in the worst of the matrices."""
        return spread(*self._counting)


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
    first = None if start is None else side.from_features(normalize(start, dim=-2).to(side.gram.dtype))
    if method == "tracked" and first is not None:
        near = by_tracking(side, tracked.widened(normalize(first, dim=-2), first.shape[-1]), energy_ratio)
        if near is not None:
            return near.directions()
    if method == "subspace" or (method == "auto" and subspace.pays(side.gram.shape[-1], start, rank)):
        found = subspace.leading_eigenpairs(side.gram, side.longest, energy_ratio, rank, first, tolerance)
        if found is not None:
            values, vectors, ranks = found
            return Leading(side, vectors, values, ranks, trace(side.gram), "subspace").directions()
    return by_eigh(side, energy_ratio, rank).directions()


def by_tracking(side: SmallSide, start: Tensor, energy_ratio: float) -> Leading | None:
    """From those of a nearby weight, ``[..., m, k]`` on its small side; None where `tracked.track` gives none."""
    found = tracked.track(side, start, energy_ratio)
    if found is None:
        return None
    return Leading(side, found.vectors, found.values, found.rank, side.total, "tracked", found.mix, found.block)


def by_eigh(side: SmallSide, energy_ratio: float, rank: int | None, track: bool = False) -> Leading:
    """By LAPACK's whole decomposition of the small side; with a block if the next ones are to be tracked."""
    side = side.whole()
    total = trace(side.gram)
    ascending, vectors = torch.linalg.eigh(side.gram)
    values = ascending.flip(-1).clamp_(min=0)
    ranks = choose_rank(values, total, noise_floor(values, side.longest), energy_ratio, rank)
    r, m = int(ranks.max()), vectors.shape[-1]
    leading = vectors[..., m - r :].flip(-1)
    block = vectors[..., max(0, m - r - tracked.guards(r)) :].flip(-1) if track else None
    return Leading(side, leading, values, ranks, total, "eigh", block=block)


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
    held = (leading.double() * own).sum(-1) / total
    return PrincipalDirections(basis.contiguous(), values, ranks, held, "svd", held)


def _own(ranks: Tensor, leading: Tensor) -> Tensor:
    """bool ``[..., r]``: the columns up to a matrix's own rank."""
    return torch.arange(leading.shape[-1], device=ranks.device) < ranks.unsqueeze(-1)
