"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_kernels._backends import cuda, gpu
from sphere_kernels._common import tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 7 rows, two 7-row matrices at a time."""
    monkeypatch.setattr(tiles, "TILE_ROWS", 7)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 98)


# Under Triton's interpreter the same contract is asked of the Triton kernels, see tests/triton/; where the CUDA kernels
# run on the CPU, of these, see tests/cuda/.
if gpu.interpreted():
    IMPLS: tuple[str, ...] = ("triton",)
elif getattr(cuda.cuda, "emulated", False):
    IMPLS = ("cuda",)
else:
    IMPLS = ("reference", "native")


@pytest.fixture(params=IMPLS)
def each_impl(request, monkeypatch):
    """``impl="auto"`` stands for one implementation after the other."""
    monkeypatch.setenv("SPHERE_KERNELS_IMPL", request.param)
    return request.param


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result owned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def largest_tensor():
    return LargestTensor()
