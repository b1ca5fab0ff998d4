"""Principal directions with the products of the Triton kernels; the eigenproblem is torch's, on the same device."""

from __future__ import annotations

from functools import partial

from sphere_kernels.directions.leading import leading_directions
from sphere_kernels.triton_kernels.products import TRITON

principal_directions = partial(leading_directions, TRITON)
