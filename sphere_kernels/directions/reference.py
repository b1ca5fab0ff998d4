"""Principal directions in plain torch."""

from __future__ import annotations

from functools import partial

from sphere_kernels._products.reference import TORCH
from sphere_kernels.directions.leading import leading_directions

principal_directions = partial(leading_directions, TORCH)
