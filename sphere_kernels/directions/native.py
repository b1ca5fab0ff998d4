"""Principal directions with the compiled CPU kernels' products; the eigenproblem stays with LAPACK."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sphere_kernels import native
from sphere_kernels.directions.leading import leading_directions
from sphere_kernels.directions.small_side import Products
from sphere_kernels.dispatch import register


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    a, b = native.merged(left), native.merged(right)
    wide = left.dtype == torch.float64
    native.cpu.product(
        native.view(a), native.view(b), native.view(native.merged(out)), wide, *native.tier_and_threads()
    )
    return out


PRODUCTS = Products(gram=partial(native.gram, normalize=False), matmul=_matmul)

register("principal_directions", "native", native.supports)(partial(leading_directions, PRODUCTS))
