"""Principal directions with the compiled CPU kernels' products; the eigenproblem stays with LAPACK."""

from __future__ import annotations

from functools import partial

from sphere_kernels import native
from sphere_kernels.directions.leading import leading_directions
from sphere_kernels.dispatch import register
from sphere_kernels.products import NATIVE

register("principal_directions", "native", native.supports)(partial(leading_directions, NATIVE))
