"""Directions tracked from those of a nearby weight: one product with the Gram matrix, the share they hold measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_kernels.directions.small_side import SmallSide
from sphere_kernels.directions.spectrum import choose_rank, noise_floor

GUARDS = 8  # and 1/32 of the rank: columns past it, for a rank that grows
LARGEST_SHARE = 0.4  # of the matrix: past it the products cost as much as the eigenproblem
LEAST_PIVOT = 0.05  # of B at unit diagonal: below it rounding, up to eps / pivot, would skew the directions
STEPS = 2  # products at most
# Of |G v - t v|^2 / |t v|^2 in the mean: up to there a rank was measured to be within 3 % of the exact one.
SETTLED = 0.02
MARGIN = 64  # times eps: what the share has to pass the ratio by, so that rounding does not take it back


@dataclass(frozen=True)
class Tracked:
    """Result of `track`.

    Attributes:
        vectors: ``[..., m, k]``, V.
        mix: ``[..., k, r]``, ``X``: the directions of a weight with few rows are ``U_hat^T V X``.
        values: ``[..., r]``, descending Ritz values.
        rank: int64 ``[...]``.
        block: ``[..., m, k']``, what to track from next; its first r columns are orthonormal.
    """

    vectors: Tensor
    mix: Tensor
    values: Tensor
    rank: Tensor
    block: Tensor


def track(side: SmallSide, start: Tensor, energy_ratio: float) -> Tracked | None:
    """The leading part of the subspace ``S = U_hat^T V``, by Rayleigh and Ritz, that passes ``energy_ratio``.

    With ``Y = G V``, ``B = V^T Y`` and ``Y^T Y`` are the Gram matrix of ``U_hat^T V`` and that of its image under the
    square root of C: ``X^T B X = I`` and ``X^T Y^T Y X = T`` give orthonormal directions ``U_hat^T V X`` that hold
    exactly T of C. So one product takes V half a step of the power method on and measures what is held there. ``Y X
    T^-1/2`` is orthonormal too, half a step further, and as a basis of the small side it holds at least T (Nyström).

    Args:
        side: of the weight.
        start: ``[..., m, k]``, V, of columns of length 1 or 0; good ones are near G's leading eigenvectors.

    Returns:
        None where the block is too wide to pay, or after `STEPS` does not hold the ratio or has not settled.
    """
    m, k = start.shape[-2:]
    if not 0 < k <= LARGEST_SHARE * m:
        return None
    products, total = side.products, side.total
    for _ in range(STEPS):
        image = side.times(start)
        values, mix = _ritz(products.matmul(start.mT, image), products.gram(image.mT))
        ratio = energy_ratio + MARGIN * torch.finfo(values.dtype).eps
        floor = noise_floor(values, side.longest)
        lengths = torch.where(values > floor.unsqueeze(-1), values.rsqrt(), 0).unsqueeze(-2)
        if _holds(values, ratio * total):
            ranks = choose_rank(values, total, floor, ratio, None)
            if _settled(values, mix, ranks):
                r = int(ranks.max())
                width = r + guards(r)
                block = products.matmul(image, mix[..., :width] * lengths[..., :width])
                return Tracked(start, mix[..., :r], values[..., :r], ranks, widened(block, r))
        start = products.matmul(image, mix * lengths)
    return None


def guards(rank: int) -> int:
    """How many columns past the rank are tracked."""
    return GUARDS + rank // 32


def widened(block: Tensor, rank: int) -> Tensor:
    """With a rank's guards, where they are missing as random columns, the same ones every time."""
    (*shape, k), width = block.shape, rank + guards(rank)
    if k >= width:
        return block
    generator = torch.Generator().manual_seed(k)  # other columns than those that made it as wide as it is
    fresh = torch.randn(*shape, width - k, generator=generator, dtype=torch.float32)
    return torch.cat([block, fresh.to(block) * shape[-1] ** -0.5], -1)


def most_held(side: SmallSide, rank: Tensor) -> Tensor:
    """The share that no subspace of this rank exceeds, fp64 ``[...]``.

    Of m numbers with sum t and sum of squares q, the r largest sum to at most ``r t / m + sqrt(r (m - r) / m (q - t^2 /
    m))`` (Wolkowicz and Styan, 1980); ``t = tr G`` and ``q = tr G^2``.
    """
    gram = side.whole().gram
    m, total = gram.shape[-1], side.total
    square = torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float64).square()
    spread = (square - total.square() / m).clamp(min=0) * rank * (m - rank) / m
    return ((rank * total / m + spread.sqrt()) / total).clamp(max=1)


def _holds(values: Tensor, needed: Tensor) -> bool:
    """Whether the whole block has what is needed, in every matrix."""
    return bool((values.double().sum(-1) > needed).all())


def _settled(values: Tensor, mix: Tensor, ranks: Tensor) -> bool:
    """Whether the directions are near eigenvectors: ``|G v - t v|^2 = t^2 |v|^2 - t`` for ``v = V x`` and V^T V = I."""
    own = torch.arange(values.shape[-1], device=ranks.device) < ranks.unsqueeze(-1)
    off = 1 - 1 / (values * mix.square().sum(-2))
    return bool((torch.where(own, off, 0).sum(-1) <= SETTLED * ranks).all())


def _ritz(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values T and X of ``X^T inner X = I``, ``X^T outer X = T``.

    Columns that are zero, or nearly combinations of those before them, are left out: they have the value 0.
    """
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    out = ~(diagonal > torch.finfo(inner.dtype).eps * diagonal.amax(-1, keepdim=True))
    scale = diagonal.rsqrt().masked_fill(out, 0)
    lower, pivots = _factor(inner, scale)
    if not bool((pivots >= LEAST_PIVOT).all()):  # NaN fails the comparison
        _, pivots = _factor(inner, scale, 1e-3)  # far from singular: the pivots say which columns to leave out
        scale = scale.masked_fill(pivots < LEAST_PIVOT, 0)
        lower, _ = _factor(inner, scale)
    half = torch.linalg.solve_triangular(lower, outer * scale.unsqueeze(-1) * scale.unsqueeze(-2), upper=False)
    values, rotation = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
    mix = torch.linalg.solve_triangular(lower.mT, rotation.flip(-1), upper=True) * scale.unsqueeze(-1)
    return values.flip(-1).clamp(min=0), mix


def _factor(inner: Tensor, scale: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cholesky factor and pivots of the matrix scaled from both sides, its diagonal ``1 + shift``; NaN where it has
    none."""
    unit = inner * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    unit.diagonal(dim1=-2, dim2=-1).fill_(1 + shift)
    lower, info = torch.linalg.cholesky_ex(unit)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    return lower, pivots.masked_fill((info != 0).unsqueeze(-1), torch.nan)
