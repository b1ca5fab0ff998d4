"""The CUDA module: whether it can run, and how it is called."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sphere_kernels._backends import gpu

cuda: Any = None
failure: str | None = None
try:
    cuda = importlib.import_module("sphere_kernels._cuda")
except ModuleNotFoundError:
    failure = "the CUDA module was not built; that takes a CUDA toolkit"
except ImportError as error:  # a module of another Python
    failure = f"the CUDA module does not load ({error})"

OLDEST = 80  # compute capability 8.0: asynchronous copies, tf32 and bf16


def supports(device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the CUDA kernels cannot take such a tensor; None when they can."""
    emulated = cuda is not None and cuda.emulated  # the kernels compiled for the CPU, see tests/cuda
    if device_type != ("cpu" if emulated else "cuda"):
        return f"it runs on CUDA tensors, not on {device_type}"
    if torch.version.hip:
        return "it runs on NVIDIA GPUs, not on ROCm"
    return failure


def precision(device: torch.device) -> int:
    """How fp32 operands are multiplied on this device, as the module counts `gpu.PRECISIONS`."""
    return gpu.PRECISIONS.index(gpu.precision(gpu.architecture(device)))


def workspace(operation: str, like: Tensor, *arguments: Any) -> Tensor:
    """Memory for what an operation of the module keeps between its kernels."""
    return like.new_empty(getattr(cuda, f"{operation}_workspace")(*arguments), dtype=torch.uint8)


def launch(operation: str, like: Tensor, *arguments: Any) -> None:
    """Run an operation of the module on the device of a tensor, in its current stream.

    Raises:
        RuntimeError: the device is too old, or CUDA refuses a launch.
    """
    stream = 0
    if like.device.type == "cuda":
        arch = gpu.architecture(like.device)
        if int(arch[3:]) < OLDEST:
            raise RuntimeError(f"the CUDA kernels need sm_{OLDEST} or later, {like.device} is {arch}")
        stream = torch.cuda.current_stream(like.device).cuda_stream
    with gpu.on(like):
        getattr(cuda, operation)(*arguments, stream)
