"""The order in which tiles of one triangle are computed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BAND = 8  # tile rows that share the columns they meet while these are in L2


@functools.lru_cache(64)
def triangle(side: int, device: torch.device) -> Tensor:
    """Tiles ``[count, 2]`` on and above the diagonal of ``side x side`` ones, int32: bands of rows, column by column.

    Launched in this order, the tiles that run at a time need `BAND` row blocks and few column blocks.
    """
    rows, cols = torch.triu_indices(side, side, device="cpu")
    order = ((rows // BAND) * side + cols) * BAND + rows % BAND
    return torch.stack([rows, cols], 1)[order.argsort()].to(device, torch.int32)


@functools.lru_cache(64)
def rectangle(rows: int, cols: int, device: torch.device) -> Tensor:
    """All tiles ``[count, 2]`` of a rectangle, in the same kind of order."""
    i, j = torch.arange(rows, device="cpu").repeat_interleave(cols), torch.arange(cols, device="cpu").repeat(rows)
    order = ((i // BAND) * cols + j) * BAND + i % BAND
    return torch.stack([i, j], 1)[order.argsort()].to(device, torch.int32)
