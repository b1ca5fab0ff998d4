"""The smaller of the two Gram matrices of the unit rows, and the way between its vectors and features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sphere_kernels._common.rows import EPSILON, UnitRows, compute_dtype
from sphere_kernels._products import Products
from sphere_kernels.directions.validation import check_norms

POLISHED_PAST = 8  # largest over smallest eigenvalue; up to there U^T V L^-1/2 is about as orthonormal as QR leaves it


@dataclass(frozen=True)
class SmallSide:
    """Matrices ``[..., n, d]`` and the smaller Gram matrix of their unit rows ``scale * rows``.

    Attributes:
        gram: ``[..., m, m]``, ``m = min(n, d)``, with the non-zero eigenvalues of C; if ``pending``, that of the rows.
        rows: ``[..., n, d]``, in the dtype of computation.
        scale: ``[..., n, 1]``; with it the rows have length 1 / sqrt(n).
        products: what multiplies.
        pending: ``gram`` still lacks ``scale`` on both sides; `whole` puts it there.
    """

    gram: Tensor
    rows: Tensor
    scale: Tensor
    products: Products
    pending: bool = False

    @classmethod
    def of(cls, weight: Tensor, products: Products) -> SmallSide:
        """Form the Gram matrix; raises for a weight that is not finite or has a zero matrix."""
        n, d = weight.shape[-2:]
        if n <= d:
            rows = weight.to(compute_dtype(weight))
            side = cls.from_gram(products.gram(rows), rows, products)
            if side is not None:
                side.gram.mul_(side.scale).mul_(side.scale.mT)
                return replace(side, pending=False)
        rows = unit_rows(weight)
        gram = products.gram(rows if n <= d else rows.mT).div_(n)
        return cls(gram, rows, rows.new_full((n, 1), n**-0.5), products)

    @classmethod
    def from_gram(cls, gram: Tensor, rows: Tensor, products: Products) -> SmallSide | None:
        """From the Gram matrix ``[..., n, n]`` of rows of ordinary length, ``n <= d``, which stays as it is: pending.

        The norms stand on its diagonal, and the unit rows are never formed. None if not all rows are of such a length.
        """
        square = gram.diagonal(dim1=-2, dim2=-1).double()
        longest = square.amax(-1)
        if not bool(((longest > EPSILON**2) & (longest < torch.inf)).all()):  # NaN fails the comparison
            return None
        scale = square.clamp(min=0).sqrt_().add_(EPSILON).mul_(rows.shape[-2] ** 0.5).reciprocal_()
        scale = scale.masked_fill_(square < 0, 0).to(rows.dtype).unsqueeze(-1)  # a zero row, but for rounding
        return cls(gram, rows, scale, products, pending=True)

    def whole(self) -> SmallSide:
        """The same with nothing pending."""
        if not self.pending:
            return self
        return replace(self, gram=self.gram.mul(self.scale).mul_(self.scale.mT), pending=False)

    def times(self, vectors: Tensor) -> Tensor:
        """``G vectors`` for ``[..., m, k]``, whether or not something is pending."""
        if not self.pending:
            return self.products.matmul(self.gram, vectors)
        return self.products.matmul(self.gram, vectors * self.scale).mul_(self.scale)

    @property
    def total(self) -> Tensor:
        """Sum of all eigenvalues of C, fp64 ``[...]``."""
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1).double()
        return (diagonal * self.scale.double().squeeze(-1).square() if self.pending else diagonal).sum(-1)

    @property
    def wide(self) -> bool:
        """Whether the Gram matrix is that of the rows, not of the columns."""
        return self.rows.shape[-2] <= self.rows.shape[-1]

    @property
    def longest(self) -> int:
        """The longer side of the matrices, which the rounding of eigenvalues grows with."""
        return max(self.rows.shape[-2:])

    def from_features(self, basis: Tensor) -> Tensor:
        """``[..., d, k]`` to the ``[..., m, k]`` that `to_features` brings near it, up to the lengths of columns."""
        return self.products.matmul(self.rows, basis).mul_(self.scale) if self.wide else basis

    def to_features(self, vectors: Tensor, values: Tensor, own: Tensor) -> Tensor:
        """Orthonormal ``U^T V L^-1/2`` of eigenvectors ``[..., m, r]``; zero where ``own [..., r]`` is False."""
        if not self.wide:
            return (vectors * own.unsqueeze(-2)).contiguous()
        basis = self.products.matmul(self.rows.mT, self.coefficients(vectors, values, own))
        if spread(values, own) > POLISHED_PAST:
            basis = torch.linalg.qr(basis).Q.mul_(own.unsqueeze(-2))
        return basis

    def coefficients(self, vectors: Tensor, values: Tensor, own: Tensor) -> Tensor:
        """``[..., n, r]``, the basis as combinations of ``rows``: what `to_features` multiplies ``rows^T`` with."""
        factor = torch.where(own, values.rsqrt(), 0).unsqueeze(-2)
        return (vectors * factor).mul_(self.scale)


def spread(values: Tensor, own: Tensor) -> float:
    """Largest eigenvalue over the smallest of those that count, in the worst of the matrices."""
    ratio = values[..., :1] / values
    return float(torch.where(own, ratio, 1).amax()) if ratio.numel() else 1.0


def unit_rows(weight: Tensor) -> Tensor:
    """The unit rows themselves, divided in fp64."""
    rows = UnitRows.of(weight)
    check_norms(weight, rows.norm)
    return rows.unit.reshape(weight.shape)
