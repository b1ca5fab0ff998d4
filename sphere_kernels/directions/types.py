"""The result of `principal_directions`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrincipalDirections:
    """Leading eigenvectors of ``C = U_hat^T U_hat / n`` for the unit rows ``U_hat [n, d]`` of a weight.

    Attributes:
        basis: ``[..., d, r]``, orthonormal columns; in a batch, zero columns past a matrix's own rank.
        eigenvalues: ``[..., k]``, descending eigenvalues of C; all ``min(n, d)`` or, for the subspace method, the
            leading ones that were certified; of the tracked method the Ritz values of the basis.
        rank: int64 ``[...]``.
        energy_ratio: float64 ``[...]``, share of the trace of C that the basis holds; of the tracked method with n > d
            what it holds at least, and ``eigenvalues`` are from below then.
        method: ``"eigh"``, ``"svd"``, ``"subspace"`` or ``"tracked"``: what computed it.
        energy_bound: float64 ``[...]``, share that no basis of this rank can exceed: of the tracked method from the
            traces of C and its square, of the others what the basis holds.
        residual: ``[..., r]``, of the tracked method, else None: an eigenvalue of C lies at most so far from each of
            ``eigenvalues``.
    """

    basis: Tensor
    eigenvalues: Tensor
    rank: Tensor
    energy_ratio: Tensor
    method: str
    energy_bound: Tensor
    residual: Tensor | None = None
