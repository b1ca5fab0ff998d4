"""Principal hyperspherical directions: where the rows of a weight point most."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels.directions import reference  # noqa: F401  (registers itself)
from sphere_kernels.directions.types import PrincipalDirections
from sphere_kernels.directions.validation import check_directions, check_unit_rows
from sphere_kernels.rows import UnitRows


@torch.no_grad()
def principal_directions(
    weight: Tensor,
    energy_ratio: float = 0.5,
    *,
    rank: int | None = None,
    method: str = "auto",
    impl: str = "auto",
) -> PrincipalDirections:
    """Leading eigenvectors of ``C = U_hat^T U_hat / n`` of the unit rows ``U_hat = w / (|w| + 1e-8)``.

    The rank is ``#{cumsum(eigenvalues) / trace <= energy_ratio} + 1``, at most the numerical rank.

    Args:
        weight: ``[..., n, d]``, one neuron per row; float64, float32, bfloat16 or float16; finite, no zero matrix.
        energy_ratio: share of the trace of C to pass, in [0, 1]; a share of energy, not of the number of directions.
        rank: takes the place of ``energy_ratio``, 0 to ``min(n, d)``; also bounded by the numerical rank.
        method: ``"eigh"`` of the smaller Gram matrix, ``"svd"`` of the unit rows (resolves small eigenvalues),
            ``"subspace"`` iteration (for few directions; falls to ``"eigh"`` where it does not converge, and the
            result says so), or ``"auto"``, today ``"eigh"``.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        `PrincipalDirections`; basis and eigenvalues are float64 for a float64 weight, else float32.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range; a weight that is empty, not finite or has a zero
            matrix; an ``impl`` that cannot run.

    Numerics:
        Never forms a d x d matrix where n < d, nor n x n where d < n. Numerical rank: eigenvalues above ``max(n, d)
        eps`` times the largest; for ``"svd"``, singular values above it. The columns are orthonormal to rounding. Not
        differentiable: it runs under ``no_grad``. Compare bases by their projector: single vectors of a dense
        spectrum are ill-conditioned.

    Source:
        SPHERE, arXiv 2510.01172; ``U = U_hat^T V L^-1/2`` for ``U_hat U_hat^T = V L V^T``.
    """
    check_directions(weight, energy_ratio, rank, method, impl)
    run = dispatch.implementation("principal_directions", impl, weight)
    unit = UnitRows.of(weight).unit.reshape(weight.shape)
    check_unit_rows(unit)
    return run(unit, float(energy_ratio), rank, "eigh" if method == "auto" else method)
