"""Tensors whose memory tells on a kernel that leaves them."""

from __future__ import annotations

import ctypes
import mmap

import torch

KEPT: list[mmap.mmap] = []  # mapped to the end


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last of them before a page that must not be touched."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    if not size:
        return tensor
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    KEPT.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return flat.view(tensor.shape).copy_(tensor)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Filled with NaN where it can hold one; where it holds bytes, with those that are NaN in every type."""
    if tensor.dtype == torch.uint8:
        return tensor.fill_(0xFF)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def far_apart(rows: int, cols: int, stride: int) -> torch.Tensor:
    """``[rows, cols]`` with rows so far apart that the last begins past 2^31 elements; only what is touched costs."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap does not name
    memory = mmap.mmap(-1, (rows * stride + cols) * 4, flags=flags)
    KEPT.append(memory)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided((rows, cols), (stride, 1))
