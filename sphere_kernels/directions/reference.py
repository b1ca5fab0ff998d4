"""Principal directions in plain torch."""

from __future__ import annotations

from functools import partial

from sphere_kernels.directions.leading import leading_directions
from sphere_kernels.dispatch import register
from sphere_kernels.products import TORCH

register("principal_directions", "reference")(partial(leading_directions, TORCH))
