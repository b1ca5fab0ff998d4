"""Rows on the unit hypersphere: the normalisation that energy and directions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8
CHUNK_ELEMENTS = 1 << 20  # fp64 working rows at a time


def row_chunks(n: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of ``range(n)`` that hold about `CHUNK_ELEMENTS` elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
    return (slice(start, min(n, start + step)) for start in range(0, n, step))


def one_batch(matrices: Tensor) -> Tensor:
    """``[..., n, d]`` with the leading dimensions made one: a view where the strides allow it."""
    return matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])


@contextmanager
def copied_back(tensor: Tensor, merged: Callable[[Tensor], Tensor], contiguous: bool = False) -> Iterator[Tensor]:
    """``merged(tensor)`` for writing: where that, or ``contiguous``, takes a copy, it is copied back at the end."""
    matrices = merged(tensor).contiguous() if contiguous else merged(tensor)
    yield matrices
    if matrices.data_ptr() != tensor.data_ptr():
        tensor.copy_(matrices.view(tensor.shape))


@dataclass(frozen=True)
class Rows:
    """Data of the unit rows ``w / (|w| + 1e-8)`` that their distances need besides the inner products.

    Attributes:
        weight: ``[batch, n, d]``, or None where only the Gram matrix is known.
        norm: ``[batch, n]``, fp64 norms of the rows.
    """

    weight: Tensor | None
    norm: Tensor

    @property
    def deficit(self) -> Tensor:
        """``1 - |unit row|^2``, ``[batch, n]`` fp64, without cancellation."""
        return EPSILON * (2 * self.norm + EPSILON) / (self.norm + EPSILON).square()

    @property
    def square(self) -> Tensor:
        """``|unit row|^2``, ``[batch, n]`` fp64."""
        return (self.norm / (self.norm + EPSILON)).square()

    def exact(self, matrix: int, rows: Tensor) -> Tensor:
        """The unit rows ``rows`` of one matrix in fp64, from the weight alone."""
        assert self.weight is not None
        picked = self.weight[matrix, rows].double()
        return picked / scale(torch.linalg.vector_norm(picked, dim=-1)).unsqueeze(-1)


@dataclass(frozen=True)
class UnitRows(Rows):
    """Matrices and their unit rows.

    Attributes:
        weight: ``[batch, n, d]``, as given.
        norm: ``[batch, n]``, fp64 norms of the rows; past 1.3e154 they overflow and the unit row is NaN.
        unit: ``[batch, n, d]``, fp64 for an fp64 weight, else fp32: divided in fp64, then rounded once.
    """

    weight: Tensor
    unit: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> UnitRows:
        """Normalise the rows of ``[..., n, d]``."""
        weight = one_batch(weight)
        batch, n, d = weight.shape
        norm = weight.new_empty(batch, n, dtype=torch.float64)
        unit = torch.empty_like(weight, dtype=compute_dtype(weight), memory_format=torch.contiguous_format)
        for chunk in row_chunks(n, batch * d):
            rows = weight[:, chunk].double()
            norm[:, chunk] = torch.linalg.vector_norm(rows, dim=-1)
            unit[:, chunk] = rows / scale(norm[:, chunk]).unsqueeze(-1)
        return cls(weight=weight, norm=norm, unit=unit)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scale(norm: Tensor) -> Tensor:
    """``|w| + 1e-8``; an overflowed norm must not turn a finite row into a plausible zero row."""
    return finite_or_nan(norm) + EPSILON


def finite_or_nan(values: Tensor) -> Tensor:
    """``values`` with NaN for infinity."""
    return values + values.sub(values)
