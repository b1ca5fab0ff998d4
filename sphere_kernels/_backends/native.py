"""The compiled CPU module: whether it can run, its instruction set, and tensors as it sees them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sphere_kernels import env
from sphere_kernels._common.rows import compute_dtype, copied_back, one_batch

cpu: Any = None
failure: str | None = None
try:
    from sphere_kernels import _cpu as cpu
except ImportError as error:  # a source tree that was not built, or a module of another Python
    failure = f"the compiled module does not load ({error})"

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # the order of csrc/common/matrix.h
View = tuple[int, ...]  # address, type, count, rows, cols, and the strides of the last three

BUILT: list[str] = [] if cpu is None else cpu.built_tiers()
USABLE: list[str] = [] if cpu is None else cpu.usable_tiers()


def supports(device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the compiled module cannot take such a tensor; None when it can."""
    if device_type != "cpu":
        return f"it runs on CPU tensors, not on {device_type}"
    return failure


def instruction_set() -> str:
    """The instruction set that runs: the fastest that this machine can, or ``SPHERE_KERNELS_ISA``.

    Raises:
        ValueError: the variable names one that this machine or this build does not have.
    """
    asked = env.kernels_isa()
    if asked == "auto":
        return USABLE[-1]
    if asked not in USABLE:
        raise ValueError(
            f"SPHERE_KERNELS_ISA must be auto or one of {', '.join(USABLE)} on this machine, got {asked!r}"
        )
    return asked


def tier_and_threads() -> tuple[int, int]:
    """Index of the instruction set and torch's number of threads, the last arguments of every kernel."""
    return BUILT.index(instruction_set()), torch.get_num_threads()


def merged(tensor: Tensor) -> Tensor:
    """The matrices of ``[..., rows, cols]`` as ``[count, rows, cols]``: a view, or a copy where none exists."""
    return one_batch(tensor.resolve_neg())


def repeated(tensor: Tensor, count: int) -> Tensor:
    """`merged`; a single matrix stands for ``count`` of them by a stride of zero, not copied."""
    return merged(tensor) if tensor.ndim > 2 else tensor.resolve_neg().expand(count, *tensor.shape)


def written(tensor: Tensor, contiguous: bool = False) -> AbstractContextManager[Tensor]:
    """`merged` for writing, see `sphere_kernels._common.rows.copied_back`."""
    return copied_back(tensor, merged, contiguous)


def view(matrices: Tensor) -> View:
    """Matrices ``[count, rows, cols]`` as the compiled module sees them; the caller keeps the tensor alive."""
    if matrices.data_ptr() == 0 and matrices.numel():
        raise ValueError(f"native kernels need tensors with memory, got a {type(matrices).__name__} without")
    return (matrices.data_ptr(), TYPES[matrices.dtype], *matrices.shape, *matrices.stride())


def gram(weight: Tensor, normalize: bool) -> Tensor:
    """Inner products of the rows of ``[..., n, d]`` or of its unit rows, ``[..., n, n]``."""
    out = weight.new_empty((*weight.shape[:-1], weight.shape[-2]), dtype=compute_dtype(weight))
    rows = merged(weight)
    cpu.gram(view(rows), normalize, *tier_and_threads(), out.data_ptr())
    return out


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` for ``[..., n, k]`` and ``[..., k, m]``, in the dtype of ``left``, fp32 or fp64; contiguous."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    _product(left, right, merged(out), accumulate=False)
    return out


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left right`` for ``[..., n, d]``, ``[..., n, b]`` and ``[..., b, d]``, in the dtype of ``out``."""
    with written(out) as matrices:
        _product(left, right, matrices, accumulate=True)


def _product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
    a, b = merged(left), merged(right)  # kept until the kernel is through: they may be copies
    cpu.product(view(a), view(b), view(out), accumulate, out.dtype == torch.float64, *tier_and_threads())


def subtract_gram_(out: Tensor, factor: Tensor) -> None:
    """``out -= factor factor^T`` for symmetric ``[..., n, n]`` and ``[..., n, b]`` of one dtype, fp32 or fp64."""
    factor = merged(factor)
    with written(out, contiguous=out.stride(-1) != 1) as matrices:
        cpu.subtract_gram(view(matrices), view(factor), *tier_and_threads())
