"""The products by the compiled CPU kernels."""

from __future__ import annotations

from functools import partial

from sphere_kernels._backends import native
from sphere_kernels._products.types import Products


def products() -> Products:
    """Products by the compiled module."""
    return NATIVE


NATIVE = Products(partial(native.gram, normalize=False), native.matmul, native.add_product_, native.subtract_gram_)
