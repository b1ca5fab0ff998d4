"""Principal directions with the products of the compiled CPU kernels; the eigenproblem stays with LAPACK."""

from __future__ import annotations

from functools import partial

from sphere_kernels._products.native import NATIVE
from sphere_kernels.directions.leading import leading_directions

principal_directions = partial(leading_directions, NATIVE)
