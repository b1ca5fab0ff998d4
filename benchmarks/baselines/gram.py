"""``M += Z R^T + R Z^T + R (X X^T) R^T`` in place, then the energy of every neuron from M, as a skilled user would.

``gram [n, n]``, ``left = R [n, b]``, ``cross = Z = W X^T [n, b]``, ``inner = X X^T [b, b]``; s = 1. All ways fold the
inner term into ``Z' = Z + R inner / 2``, so that the update is one product of ``[n, 2 b]`` factors. Calls of one size
share a work buffer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.baselines.energy import compile_once

Result = tuple[Tensor, Tensor]  # the new M, and the energy of every neuron in fp64
CHUNK = 256
SMALL = 1e-12


def addmm(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """One ``addmm_``, then the energy in a kept buffer: n x n."""
    first, second = _factors(left, cross, inner)
    gram.addmm_(first, second.T)
    return gram, _energy(gram, _inverse_norms(gram), 0, _buffer(len(gram), len(gram), gram.device))


def baddbmm(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """One ``baddbmm_``, then the energy in a kept buffer: n x n."""
    first, second = _factors(left, cross, inner)
    gram[None].baddbmm_(first[None], second.T[None])
    return gram, _energy(gram, _inverse_norms(gram), 0, _buffer(len(gram), len(gram), gram.device))


def chunked(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """One ``addmm_``, then the energy in chunks of rows: `CHUNK` x n."""
    first, second = _factors(left, cross, inner)
    gram.addmm_(first, second.T)
    inverse, buffer = _inverse_norms(gram), _buffer(CHUNK, len(gram), gram.device)
    starts = range(0, len(gram), CHUNK)
    return gram, torch.cat([_energy(gram[i : i + CHUNK], inverse, i, buffer) for i in starts])


def chunked_both(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """``addmm_`` and energy together, one chunk of rows at a time: `CHUNK` x n."""
    first, second = _factors(left, cross, inner)
    diagonal = gram.diagonal() + (first * second).sum(1)
    inverse, buffer = 1 / (diagonal.sqrt() + 1e-8), _buffer(CHUNK, len(gram), gram.device)
    energies = []
    for start in range(0, len(gram), CHUNK):
        rows = gram[start : start + CHUNK].addmm_(first[start : start + CHUNK], second.T)
        energies.append(_energy(rows, inverse, start, buffer))
    return gram, torch.cat(energies)


def compiled(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """One ``addmm_``, then the energy as one loop by ``torch.compile``: nothing."""
    first, second = _factors(left, cross, inner)
    gram.addmm_(first, second.T)
    return gram, compile_once(_formula)(gram)


def exact(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    """The yardstick: the new M and the energies in fp64."""
    gram, left, cross, inner = (t.double() for t in (gram, left, cross, inner))
    gram = gram + cross @ left.T + left @ cross.T + left @ inner @ left.T
    return gram, _formula(gram)


def _factors(left: Tensor, cross: Tensor, inner: Tensor) -> Result:
    half = torch.addmm(cross, left, inner, alpha=0.5)
    return torch.cat([left, half], 1), torch.cat([half, left], 1)


def _inverse_norms(gram: Tensor) -> Tensor:
    return 1 / (gram.diagonal().sqrt() + 1e-8)


def _energy(rows: Tensor, inverse: Tensor, start: int, buffer: Tensor) -> Tensor:
    """Energies of the rows of M from ``start`` on."""
    buffer = buffer[: len(rows)]
    torch.mul(rows, inverse, out=buffer)
    buffer.mul_(inverse[start : start + len(rows), None]).mul_(-2).add_(2).clamp_(min=SMALL).rsqrt_()
    buffer.diagonal(start).zero_()
    return buffer.sum(1).double()


def _formula(gram: Tensor) -> Tensor:
    inverse, index = _inverse_norms(gram), torch.arange(len(gram), device=gram.device)
    square = (2 - 2 * gram * inverse * inverse[:, None]).clamp(min=SMALL)
    return torch.where(index == index[:, None], 0, square.rsqrt()).sum(1, dtype=torch.float64)


@lru_cache(maxsize=2)
def _buffer(rows: int, cols: int, device: torch.device) -> Tensor:
    return torch.empty(rows, cols, device=device)
