"""Block subspace iteration with Rayleigh-Ritz: the leading eigenpairs of a Gram matrix, or None."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace

FIRST_BLOCK = 32
LARGEST_SHARE = 4  # a block past 1/4 of the matrix costs about as much as the full eigenproblem
SWEEPS = 30
SWEEPS_TO_JUDGE = 4  # before a block is held to be too small


def leading_eigenpairs(
    gram: Tensor, longest: int, energy_ratio: float, rank: int | None
) -> tuple[Tensor, Tensor] | None:
    """Descending eigenvalues and eigenvectors up to the rank asked for, each certified by its residual.

    Some eigenvalue lies within ``|G v - value v|`` of ``value``; the pairs are taken once that is at the level of
    rounding for all of them. The block doubles until it holds more than ``energy_ratio`` of the trace.

    Args:
        gram: ``[..., m, m]``, symmetric, positive semi-definite.
        longest: ``max(n, d)`` of the weight, for the numerical rank.
        energy_ratio, rank: as for `principal_directions`.

    Returns:
        ``[..., k]`` and ``[..., m, k]``, or None where the block or the sweeps run out.
    """
    m, total = gram.shape[-1], trace(gram)
    generator = torch.Generator().manual_seed(0)  # the same answer every time; the global generator is left alone
    size = FIRST_BLOCK + (rank or 0)
    basis = gram[..., :0]
    while size <= m // LARGEST_SHARE:
        fresh = torch.randn(*gram.shape[:-1], size - basis.shape[-1], generator=generator)
        basis = torch.cat([basis, fresh.to(gram)], -1)
        for sweep in range(SWEEPS):
            values, basis, residual = _sweep(gram, basis)
            floor = noise_floor(values, longest)
            if rank is None and not _reaches(values, total, floor, energy_ratio):
                if sweep + 1 < SWEEPS_TO_JUDGE:
                    continue
                break
            wanted = max(1, int(choose_rank(values, total, floor, energy_ratio, rank).max()))
            if _certified(values[..., :wanted], residual[..., :wanted]):
                return values[..., :wanted], basis[..., :wanted]
        else:
            return None  # large enough, but the spectrum is too flat to converge
        size *= 2
    return None


def _sweep(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One power step and Rayleigh-Ritz: values, vectors and residual norms, descending."""
    basis = torch.linalg.qr(gram @ basis).Q
    image = gram @ basis
    values, rotation = torch.linalg.eigh(basis.mT @ image)
    values, rotation = values.flip(-1), rotation.flip(-1)
    basis = basis @ rotation
    residual = torch.linalg.vector_norm(image @ rotation - basis * values.unsqueeze(-2), dim=-2)
    return values, basis, residual


def _reaches(values: Tensor, total: Tensor, floor: Tensor, energy_ratio: float) -> bool:
    """Whether every matrix's block passes the energy ratio, or has run into the noise."""
    passed = values.double().sum(-1) / total > energy_ratio
    return bool((passed | (values[..., -1] <= floor)).all())


def _certified(values: Tensor, residual: Tensor) -> bool:
    tolerance = torch.finfo(values.dtype).eps ** 0.75 * values[..., :1]
    return bool((residual <= tolerance).all())
