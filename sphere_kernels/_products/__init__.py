"""The matrix products that several operations build on, as each implementation brings them."""

from __future__ import annotations

from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels._products.types import Products


def products_for(tensor: Tensor, impl: str = "auto") -> Products:
    """The products that ``impl`` gives for tensors like this one, see `sphere_kernels.dispatch.select`."""
    found: Products = dispatch.implementation("products", impl, tensor)()
    return found
