"""Principal directions in plain torch."""

from __future__ import annotations

from functools import partial

import torch

from sphere_kernels.directions.leading import leading_directions
from sphere_kernels.directions.small_side import Products
from sphere_kernels.dispatch import register

PRODUCTS = Products(gram=lambda rows: rows @ rows.mT, matmul=torch.matmul)

register("principal_directions", "reference")(partial(leading_directions, PRODUCTS))
