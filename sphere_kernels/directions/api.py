"""Principal hyperspherical directions: where the rows of a weight point most."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.directions.validation import check_directions


@torch.no_grad()
def principal_directions(
    weight: Tensor,
    energy_ratio: float = 0.5,
    *,
    rank: int | None = None,
    method: str = "auto",
    start: PrincipalDirections | Tensor | None = None,
    tolerance: float | None = None,
    impl: str = "auto",
) -> PrincipalDirections:
    """Leading eigenvectors of ``C = U_hat^T U_hat / n`` of the unit rows ``U_hat = w / (|w| + 1e-8)``.

    The rank is ``#{cumsum(eigenvalues) / trace <= energy_ratio} + 1``, at most the numerical rank.

    Args:
        weight: ``[..., n, d]``, one neuron per row; float64, float32, bfloat16 or float16; finite, no zero matrix.
        energy_ratio: share of the trace of C to pass, in [0, 1]; a share of energy, not of the number of directions.
        rank: takes the place of ``energy_ratio``, 0 to ``min(n, d)``; also bounded by the numerical rank.
        method: ``"eigh"`` of the smaller Gram matrix, ``"svd"`` of the unit rows (resolves small eigenvalues),
            ``"subspace"`` iteration (for few directions; falls to ``"eigh"`` where these are too large a share or too
            slow to converge), ``"tracked"`` from a ``start`` by a product or two with the Gram matrix (holds more than
            ``energy_ratio``, measured, by a few directions more than the least number; falls to ``"eigh"`` without a
            start, where more than 0.4 of ``min(n, d)`` are needed, and where two products do not reach the share or
            settle), or ``"auto"``: ``"subspace"`` from a ``start`` (and for a ``rank``) of at most 1/32 of ``min(n,
            d)`` columns, else ``"eigh"``. The result says which it was.
        start: directions of a nearby weight, or their basis ``[..., d, k]`` with the leading dimensions of ``weight``,
            to begin from. It may be wrong: that costs time, not accuracy.
        tolerance: of the iteration, 0 to 1; None for ``eps^0.75``, near rounding. The eigenvectors of the Gram matrix G
            found are the exact leading ones of a matrix within ``tolerance |G|`` of it, and so is the rank its own.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        `PrincipalDirections`; basis and eigenvalues are float64 for a float64 weight, else float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range; a weight that is empty, not finite or has a zero
            matrix; a ``start`` that is not finite; a ``start`` or ``tolerance`` with ``"eigh"`` or ``"svd"``; a
            ``rank`` or ``tolerance`` with ``"tracked"``; an ``impl`` that cannot run.

    Numerics:
        Never forms a d x d matrix where n < d, nor n x n where d < n. Numerical rank: eigenvalues above ``max(n, d)
        eps`` times the largest; for ``"svd"``, singular values above it. The columns are orthonormal to rounding.
        The iteration's certificate is the residual and a Cholesky factorisation that shows nothing larger was missed;
        its cumulative shares never exceed the true ones, so its rank is never too small, and where the true share
        passes ``energy_ratio`` by less than the error, it may be too large. Tracked directions come from Rayleigh and
        Ritz in the span of ``U_hat^T U_hat start`` and a few random columns: the share is theirs, not an estimate, and
        by Ky Fan no larger than that of as many exact ones. Not differentiable: it runs under
        ``no_grad``. Compare bases by their projector: single vectors of a dense spectrum are ill-conditioned.

    Source:
        SPHERE, arXiv 2510.01172; ``U = U_hat^T V L^-1/2`` for ``U_hat U_hat^T = V L V^T``. Tracked: one step of the
        block power method; the share by the Nyström approximation.
    """
    basis = check_directions(weight, energy_ratio, rank, method, start, tolerance, impl)
    run = dispatch.implementation("principal_directions", impl, weight)
    return run(weight, float(energy_ratio), rank, method, basis, tolerance)
