"""SPHERE's projection under the signature of the published code, to take its place there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sphere_kernels._common import checks
from sphere_kernels.directions import principal_directions
from sphere_kernels.projection import sparse_projection as project


@dataclass(frozen=True, eq=False)
class SoftProjector:
    """``I - alpha U U^T`` ``[d, d]``, kept as ``U``: symmetric, and multiplied with a matrix by ``@`` from either side.

    Attributes:
        directions: U ``[d, r]``.
        alpha: suppression strength.
    """

    directions: Tensor
    alpha: float

    @property
    def shape(self) -> torch.Size:
        d = self.directions.shape[0]
        return torch.Size((d, d))

    @property
    def T(self) -> SoftProjector:
        return self

    def __rmatmul__(self, matrix: Tensor) -> Tensor:
        return project(matrix, self.directions, self.alpha)

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return project(matrix.mT, self.directions, self.alpha).mT

    def dense(self) -> Tensor:
        """The matrix itself, in the dtype of U."""
        eye = torch.eye(self.shape[0], dtype=self.directions.dtype, device=self.directions.device)
        return project(eye, self.directions, self.alpha)


class Projected(NamedTuple):
    """Result of the published function.

    Attributes:
        B_proj: the projected update, ``[..., d]`` as B.
        P_soft: the projector.
        U: ``[d, r]``, eigenvalues ascending along the columns; float64 for a float64 weight, else float32.
    """

    B_proj: Tensor
    P_soft: SoftProjector
    U: Tensor


def sparse_projection(A: Tensor, B: Tensor, eta: float = 0.5, alpha: float = 0.5) -> Projected:
    """Project an update out of the principal directions of its weight: ``B (I - alpha U U^T)``.

    In EasyEdit delete ``sparse_projection`` from ``models/SPHERE/SPHERE_main.py``; in the official repository
    ``project_B_into_soft_dirs`` from the method's file. Then three lines change::

        from sphere_kernels.published import sparse_projection

        B_proj, P_soft, U = sparse_projection(w, upd_matrix.float(), eta=beta_hse, alpha=alpha)
        w[...] += B_proj

    Args:
        A: the weight before the update, ``[n, d]`` float64, float32, bfloat16 or float16. Its rows are taken for the
            neurons, as published: right for ``nn.Linear``; for a Conv1D weight ``[in, out]`` give ``A.T`` and ``B.T``
            and transpose the result to have neurons, or both as they are stored to have what the published code does.
        B: the update, ``[..., d]`` with the columns of A: same device, any of these dtypes.
        eta: cumulative ratio in [0, 1]. The rank is ``#{cumsum(eigenvalues) / sum <= eta} + 1``, as published, but at
            most the numerical rank; in the published code rounding decides at ``eta = 1``.
        alpha: suppression strength in [0, 1].

    Returns:
        `Projected`, which unpacks as the published three: ``B_proj`` has dtype and device of B.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range; a weight that is not finite or has
            no row but zeros.

    Numerics:
        As `principal_directions` and `sphere_kernels.sparse_projection`: where n < d no d x d matrix is formed, and
        nothing is printed. Equal to the published dense code up to rounding.

    Source:
        SPHERE, arXiv 2510.01172; signature of its code and EasyEdit's.
    """
    checks.matrix("A", A)
    checks.matrix("B", B)
    if A.ndim != 2 or B.shape[-1] != A.shape[-1]:
        raise ValueError(
            f"A must be a weight [n, d] and B an update with its d columns, got shapes {list(A.shape)} and "
            f"{list(B.shape)}"
        )
    checks.same_device("B", B, "A", A)
    checks.number("eta", eta, low=0, high=1)
    checks.number("alpha", alpha, low=0, high=1)
    directions = principal_directions(A.detach(), eta).basis.flip(-1)
    return Projected(project(B, directions, alpha), SoftProjector(directions, float(alpha)), directions)
