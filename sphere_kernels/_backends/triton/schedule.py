"""The order in which tiles are computed: bands of rows, column by column."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BAND = 8  # tile rows that share the columns they meet while these are in L2


# Kept for good: a captured graph or another stream may still read them. The first call of a size copies to the device,
# which a capture does not allow.
@functools.cache
def triangle(side: int, device: torch.device) -> Tensor:
    """Tiles ``[count, 2]`` on and above the diagonal of ``side x side`` ones, int32."""
    rows, cols = torch.triu_indices(side, side, device="cpu")
    return in_bands(rows, cols, side, device)


@functools.cache
def rectangle(rows: int, cols: int, device: torch.device) -> Tensor:
    """All tiles ``[count, 2]`` of a rectangle, int32."""
    places = torch.arange(rows * cols, device="cpu")
    return in_bands(places // cols, places % cols, cols, device)


def in_bands(rows: Tensor, cols: Tensor, width: int, device: torch.device) -> Tensor:
    """Tiles in the order in which they are launched: those that run at a time need `BAND` row blocks, few others."""
    order = ((rows // BAND) * width + cols) * BAND + rows % BAND
    return torch.stack([rows, cols], 1)[order.argsort()].to(device, torch.int32)
