"""Chebyshev-filtered subspace iteration: the leading eigenpairs of a Gram matrix with a certificate, or None."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphere_kernels.directions.spectrum import choose_rank, noise_floor, trace

FIRST_BLOCK = 24  # where neither a rank nor a start says how many are wanted; doubled until it holds enough
GUARDS = 8  # and a quarter of what is wanted: the filter separates this from all that lies past the block
LARGEST_SHARE = 0.4  # of the matrix: a larger block costs as much as the full eigenproblem
BUDGET = 2  # products with a block of full size; with all that goes with them, the time of eigh
PAYING_SHARE = 1 / 32  # of the matrix: from a start this narrow, the iteration was measured to beat eigh
HIGHEST_DEGREE = 8
SWEEPS_TO_JUDGE = 2  # of a random block, before it is held to be too small or the spectrum too flat


def pays(m: int, start: Tensor | None, rank: int | None) -> bool:
    """Whether the iteration is expected to cost less than the full eigenproblem of an ``[m, m]`` matrix."""
    return start is not None and _wanted(start, rank) <= PAYING_SHARE * m


def leading_eigenpairs(
    gram: Tensor, longest: int, energy_ratio: float, rank: int | None, start: Tensor | None, tolerance: float | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading eigenvalues and eigenvectors, exact for a matrix within ``tolerance`` times the largest eigenvalue.

    With ``R = G V - V T`` for Ritz pairs ``V, T``, the columns of V are eigenvectors of ``G - R V^T - V R^T``. They
    lead there up to a shift s where ``(t_r + s) I - G + V T V^T`` has a Cholesky factor. The distance from G is at most
    ``(s + sqrt(s^2 + 4 |R|^2)) / 2``: the tolerance, for ``|R|`` up to 0.8 and s at 0.36 of it.

    Args:
        gram: ``[..., m, m]``, symmetric, positive semi-definite.
        longest: ``max(n, d)`` of the weight, for the numerical rank.
        energy_ratio, rank: as for `principal_directions`.
        start: ``[..., m, k]``, columns near the leading eigenvectors, of any length; the rest of the block is random.
        tolerance: 0 to 1, or None for ``eps^0.75``.

    Returns:
        ``[..., r]``, ``[..., m, r]`` and the ranks ``[...]``, or None where the block or the budget runs out.
    """
    m, total, eps = gram.shape[-1], trace(gram), torch.finfo(gram.dtype).eps
    tolerance = eps**0.75 if tolerance is None else tolerance
    generator = torch.Generator().manual_seed(0)  # the same answer every time; the global generator is left alone
    basis = gram[..., :0] if start is None else start
    wanted = _wanted(start, rank) or FIRST_BLOCK
    size, spent = wanted + wanted // 4 + GUARDS, 0.0
    blind = SWEEPS_TO_JUDGE if start is None else 1
    while size <= LARGEST_SHARE * m:
        fresh = torch.randn(*gram.shape[:-1], size - basis.shape[-1], generator=generator, dtype=torch.float32)
        basis = torch.linalg.qr(torch.cat([basis, fresh.to(gram)], -1)).Q
        sweep = 0
        while True:
            sweep, spent = sweep + 1, spent + size / m
            values, basis, image = _ritz(gram, basis)
            floor = noise_floor(values, longest)
            ranks = choose_rank(values, total, floor, energy_ratio, rank)
            reached = rank is not None or _reaches(values, total, floor, energy_ratio)
            if not reached and sweep >= blind:
                break
            own = torch.arange(size, device=ranks.device) < ranks.clamp(min=1).unsqueeze(-1)
            error = _residual(basis, image, values, own) / tolerance
            if reached and bool((error <= 0.8).all()) and _leads(gram, basis, values, own, floor, tolerance):
                r = int(ranks.max())
                return values[..., :r], basis[..., :r], ranks
            bottom = torch.maximum(values[..., -1], eps * values[..., 0])  # rounding may leave the last one negative
            needed, degree = _degrees(values, bottom, own, error, eps)
            if sweep >= blind and not spent + needed * size / m <= BUDGET:
                return None  # the spectrum is too flat to converge in time
            basis = torch.linalg.qr(_filter(gram, basis, image, bottom[..., None, None], degree)).Q
            spent += (degree - 1) * size / m
        size *= 2
    return None


def _wanted(start: Tensor | None, rank: int | None) -> int:
    return max(rank or 0, start.shape[-1] if start is not None else 0)


def _ritz(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Descending Ritz values of an orthonormal basis, their vectors, and the products of the matrix with these."""
    image = gram @ basis
    values, rotation = torch.linalg.eigh(basis.mT @ image)
    rotation = rotation.flip(-1)
    return values.flip(-1), basis @ rotation, image @ rotation


def _residual(basis: Tensor, image: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """Spectral norm of ``G V - V T`` over the largest Ritz value, for the columns of ``own``."""
    k = int(own.sum(-1).max())
    residual = (image[..., :k] - basis[..., :k] * values[..., None, :k]) * own[..., None, :k] / values[..., None, :1]
    return torch.linalg.eigvalsh(residual.mT @ residual)[..., -1].clamp(min=0).sqrt()


def _reaches(values: Tensor, total: Tensor, floor: Tensor, energy_ratio: float) -> bool:
    """Whether every matrix's block passes the energy ratio, or has run into the noise."""
    passed = values.double().sum(-1) / total > energy_ratio
    return bool((passed | (values[..., -1] <= floor)).all())


def _leads(gram: Tensor, basis: Tensor, values: Tensor, own: Tensor, floor: Tensor, tolerance: float) -> bool:
    """Whether what the vectors of ``own`` leave of the matrix stays below the last of their values, or in the noise."""
    last = values.masked_fill(~own, torch.inf).amin(-1)
    noise = ((values > floor.unsqueeze(-1)) <= own).all(-1) & (values[..., -1] <= floor)  # the floor set the rank
    ceiling = torch.where(noise, torch.minimum(last, floor), last) + 0.36 * tolerance * values[..., 0]
    rest = ((basis * (values * own).unsqueeze(-2)) @ basis.mT).sub_(gram)
    rest.diagonal(dim1=-2, dim2=-1).add_(ceiling.unsqueeze(-1))
    return bool((torch.linalg.cholesky_ex(rest).info == 0).all())


def _degrees(values: Tensor, bottom: Tensor, own: Tensor, error: Tensor, eps: float) -> tuple[float, int]:
    """The degree that is predicted to bring the error down, and the one that a sweep takes."""
    last = values.masked_fill(~own, torch.inf).amin(-1)
    growth, steepest = (torch.acosh((2 * v / bottom - 1).double().clamp(min=1)) for v in (last, values[..., 0]))
    # Without a guard left nothing grows, and more than any budget is needed.
    needed = float((torch.acosh((error / 0.4).double().clamp(min=1)) / growth.clamp(min=eps)).max())
    safe = float((-0.75 * math.log(eps) / steepest).min())  # past it the columns would all turn to the largest
    return needed, int(max(1, min(needed + 1, safe, HIGHEST_DEGREE)))


def _filter(gram: Tensor, basis: Tensor, image: Tensor, bottom: Tensor, degree: int) -> Tensor:
    """``T_degree(2 G / bottom - 1)`` of the basis: at most 1 for eigenvalues below the bottom, growing fast above."""
    previous, current = basis, image * (2 / bottom) - basis
    if degree > 1:
        doubled = gram * (4 / bottom)
        doubled.diagonal(dim1=-2, dim2=-1).sub_(2)
        for _ in range(degree - 1):
            previous, current = current, (doubled @ current).sub_(previous)
    return current
