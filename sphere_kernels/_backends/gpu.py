"""The Triton backends before triton is imported: whether they can run, their precision, their memory."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sphere_kernels import env
from sphere_kernels._common.rows import copied_back, one_batch

PRECISIONS = ("ieee", "tf32x3", "tf32")
OLDEST_TRITON = (3, 5)  # whose compiler takes all kernels; tested is that of constraints.txt


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU; triton decides that when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the Triton kernels cannot take such a tensor; None when they can."""
    if device_type != "cuda" and not (device_type == "cpu" and interpreted()):
        return f"it runs on CUDA and ROCm tensors (on CPU tensors only under TRITON_INTERPRET=1), not on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sphere-kernels[triton]')"
    if (version := _triton_version()) < OLDEST_TRITON:
        return f"it needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, found {'.'.join(map(str, version))}"
    if device_type == "cuda" and not torch.version.hip and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"it needs a GPU of sm_80 or later, found sm_{major}{minor}"
    return None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    """Of the distribution that brings triton; by whatever name, ROCm's are others."""
    for name in importlib.metadata.packages_distributions().get("triton", []):
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2] if part.isdigit())
    return OLDEST_TRITON  # not installed by pip


def architecture(device: torch.device) -> str:
    """``"sm_90"`` and the like, ``"gfx942"``, or ``"interpreter"``."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(arch: str) -> str:
    """How fp32 operands are multiplied on this architecture: one of `PRECISIONS`, by ``SPHERE_KERNELS_DOT``.

    Raises:
        ValueError: the variable names none of them, or one that the architecture does not have.
    """
    asked = env.kernels_dot()
    if asked not in ("auto", *PRECISIONS):
        raise ValueError(f"SPHERE_KERNELS_DOT must be one of auto, {', '.join(PRECISIONS)}, got {asked!r}")
    has = _precisions_of(arch)
    if asked == "auto":
        return "tf32x3" if "tf32x3" in has else "ieee"
    if asked not in has:
        raise ValueError(f"SPHERE_KERNELS_DOT must be auto or one of {', '.join(has)} on {arch}, got {asked!r}")
    return asked


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the device of this tensor."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def merged(tensor: Tensor) -> Tensor:
    """The matrices of ``[..., rows, cols]`` as ``[count, rows, cols]``: a view, or a copy where none exists.

    The interpreter computes nonsense with bfloat16, so there it gets the same values in float32.
    """
    matrices = one_batch(tensor.resolve_neg())
    if matrices.numel() and matrices.data_ptr() == 0:
        raise ValueError(f"Triton kernels need tensors with memory, got a {type(tensor).__name__} without")
    return matrices.float() if interpreted() and tensor.dtype == torch.bfloat16 else matrices


def written(tensor: Tensor, contiguous: bool = False) -> AbstractContextManager[Tensor]:
    """`merged` for writing, see `sphere_kernels._common.rows.copied_back`."""
    return copied_back(tensor, merged, contiguous)


def fresh(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a result; for the interpreter, float32 in place of bfloat16."""
    return like.new_empty(shape, dtype=torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype)


def _precisions_of(arch: str) -> tuple[str, ...]:
    if arch.startswith("gfx"):
        return ("ieee", "tf32") if arch in ("gfx940", "gfx941", "gfx942") else ("ieee",)
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return ("ieee",)
    return PRECISIONS
