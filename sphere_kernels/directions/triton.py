"""Principal directions with the products of the Triton kernels; torch solves the eigenproblem, on the same device."""

from __future__ import annotations

from functools import partial

from sphere_kernels._products.triton import TRITON
from sphere_kernels.directions.leading import leading_directions

principal_directions = partial(leading_directions, TRITON)
