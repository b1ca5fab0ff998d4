"""The matrix products that several operations build on, as each backend brings them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sphere_kernels import dispatch, gpu, native


@dataclass(frozen=True)
class Products:
    """Products of matrices ``[..., rows, columns]`` of one dtype, fp32 or fp64; results are in it.

    Attributes:
        gram: ``A -> A A^T``, a fresh tensor.
        matmul: ``A, B -> A B``, a fresh contiguous tensor.
        add_: ``C, A, B``: ``C += A B`` in place.
        subtract_gram_: ``H, A``: ``H -= A A^T`` in place; ``H`` is symmetric and stays exactly so.
    """

    gram: Callable[[Tensor], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    add_: Callable[[Tensor, Tensor, Tensor], object]
    subtract_gram_: Callable[[Tensor, Tensor], object]


def _exact(product: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever autocast is in force."""
    return lambda *tensors: dispatch.outside_autocast(product, tensors[0].device.type)(*tensors)


def _subtract_gram_(h: Tensor, a: Tensor) -> None:
    gram = a @ a.mT  # symmetric up to rounding only
    h.sub_(gram.add_(gram.mT.clone()).div_(2))


TORCH = Products(
    gram=_exact(lambda a: a @ a.mT),
    matmul=_exact(torch.matmul),
    add_=_exact(lambda c, a, b: c.add_(a @ b)),
    subtract_gram_=_exact(_subtract_gram_),
)
NATIVE = Products(partial(native.gram, normalize=False), native.matmul, native.add_product_, native.subtract_gram_)

dispatch.register("products", "reference")(lambda: TORCH)
dispatch.register("products", "native", native.supports)(lambda: NATIVE)
gpu.register("sphere_kernels.triton_kernels.products", "products")


def products_for(tensor: Tensor, impl: str = "auto") -> Products:
    """The products that ``impl`` gives for tensors like this one, see `sphere_kernels.dispatch.select`."""
    found: Products = dispatch.implementation("products", impl, tensor)()
    return found
