"""The smaller of the two Gram matrices of the unit rows, and the way between its vectors and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_kernels.directions.validation import check_norms
from sphere_kernels.rows import EPSILON, UnitRows, compute_dtype

POLISHED_PAST = 8  # largest over smallest eigenvalue; up to there U^T V L^-1/2 is about as orthonormal as QR leaves it


@dataclass(frozen=True)
class Products:
    """The two products with the weight that a backend brings.

    Attributes:
        gram: ``A -> A A^T`` for ``[..., m, k]``, a fresh tensor.
        matmul: ``A, B -> A B``, a fresh contiguous tensor.
    """

    gram: Callable[[Tensor], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SmallSide:
    """Matrices ``[..., n, d]`` and the smaller Gram matrix of their unit rows ``scale * rows``.

    Attributes:
        gram: ``[..., m, m]``, ``m = min(n, d)``, with the non-zero eigenvalues of C.
        rows: ``[..., n, d]``, in the dtype of computation.
        scale: ``[..., n, 1]``; with it the rows have length 1 / sqrt(n).
        products: what multiplies.
    """

    gram: Tensor
    rows: Tensor
    scale: Tensor
    products: Products

    @classmethod
    def of(cls, weight: Tensor, products: Products) -> SmallSide:
        """Form the Gram matrix; raises for a weight that is not finite or has a zero matrix."""
        n, d = weight.shape[-2:]
        if n <= d:
            # Rows of ordinary length: their norms stand on the diagonal, and the unit rows are never formed.
            rows = weight.to(compute_dtype(weight))
            gram = products.gram(rows)
            square = gram.diagonal(dim1=-2, dim2=-1).double()
            longest = square.amax(-1)
            if bool(((longest > EPSILON**2) & (longest < torch.inf)).all()):  # NaN fails the comparison
                scale = (square.sqrt().add_(EPSILON).mul_(n**0.5)).reciprocal_().to(rows.dtype).unsqueeze(-1)
                return cls(gram.mul_(scale).mul_(scale.mT), rows, scale, products)
        rows = unit_rows(weight)
        gram = products.gram(rows if n <= d else rows.mT).div_(n)
        return cls(gram, rows, rows.new_full((n, 1), n**-0.5), products)

    @property
    def wide(self) -> bool:
        """Whether the Gram matrix is that of the rows, not of the columns."""
        return self.rows.shape[-2] <= self.rows.shape[-1]

    def from_features(self, basis: Tensor) -> Tensor:
        """``[..., d, k]`` to the ``[..., m, k]`` that `to_features` brings near it, up to the lengths of columns."""
        return self.products.matmul(self.rows, basis).mul_(self.scale) if self.wide else basis

    def to_features(self, vectors: Tensor, values: Tensor, own: Tensor) -> Tensor:
        """Orthonormal ``U^T V L^-1/2`` of eigenvectors ``[..., m, r]``; zero where ``own [..., r]`` is False."""
        if not self.wide:
            return (vectors * own.unsqueeze(-2)).contiguous()
        factor = torch.where(own, values.rsqrt(), 0).unsqueeze(-2)
        basis = self.products.matmul(self.rows.mT, (vectors * factor).mul_(self.scale))
        if bool((own & (values[..., :1] > POLISHED_PAST * values)).any()):
            basis = torch.linalg.qr(basis).Q.mul_(own.unsqueeze(-2))
        return basis


def unit_rows(weight: Tensor) -> Tensor:
    """The unit rows themselves, divided in fp64."""
    rows = UnitRows.of(weight)
    check_norms(weight, rows.norm)
    return rows.unit.reshape(weight.shape)
