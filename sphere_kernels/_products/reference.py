"""The products in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sphere_kernels import dispatch
from sphere_kernels._products.types import Products


def products() -> Products:
    """Products by torch."""
    return TORCH


def _exact(product: Callable[..., Any]) -> Callable[..., Any]:
    """The product outside any autocast."""
    return lambda *tensors: dispatch.outside_autocast(product, tensors[0].device.type)(*tensors)


def _subtract_gram_(h: Tensor, a: Tensor) -> None:
    gram = a @ a.mT  # symmetric up to rounding only
    h.sub_(gram.add_(gram.mT.clone()).div_(2))


TORCH = Products(
    gram=_exact(lambda a: a @ a.mT),
    matmul=_exact(torch.matmul),
    add_=_exact(lambda c, a, b: c.add_(a @ b)),
    subtract_gram_=_exact(_subtract_gram_),
    symmetric=False,
)
