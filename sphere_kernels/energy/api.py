"""Hyperspherical energy: how evenly the rows of a weight sit on the unit hypersphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sphere_kernels._common import checks
from sphere_kernels.energy import ops
from sphere_kernels.energy.validation import check_energy, check_options, ordered_pairs


def hyperspherical_energy(
    weight: Tensor,
    s: float = 1.0,
    *,
    reduction: str = "sum",
    distance: str = "euclidean",
    half_space: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Riesz energy of the rows of a weight on the unit hypersphere, summed over ordered pairs.

    ``E_i = sum_{j != i} f_s(t_ij)``, ``f_s(t) = t^-s`` and ``f_0(t) = log(1/t)``, where ``t_ij`` is the distance of
    the rows ``w / (|w| + 1e-8)``. Lower is more uniform; `orthogonal_energy` is the value to compare with.

    Args:
        weight: ``[..., n, d]``, one neuron per row (transpose a Conv1D weight); float64, float32, bfloat16 or
            float16, on any device, any strides.
        s: exponent, finite and >= 0.
        reduction: ``"sum"`` of ``E_i``, ``"mean"`` over ordered pairs, or ``"none"`` for ``E_i`` itself.
        distance: ``"euclidean"`` or ``"angular"`` (``arccos`` of the inner product, radians).
        half_space: the energy of the 2n rows ``cat([weight, -weight])``; ``"none"`` returns its first n.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        float64 ``[...]``, or ``[..., n]`` for ``reduction="none"``. The sum over fewer than two rows is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range; a mean over fewer than two rows; an ``impl``
            that cannot run, or that has no backward pass (``"cuda"``) for a weight that requires grad.

    Numerics:
        Inner products are computed in fp32 (fp64 for a float64 weight), norms and sums in fp64. A pair's value is fp64
        in the reference; native, Triton and CUDA take its excess over that of orthogonal rows in the dtype of the inner
        products, and sum that (for s = 1 and 2). In any, fp32 leaves an error of about 1e-11 of the energy of rows
        spread in many dimensions; at d = 3, where many pairs are close without being near, about 1e-7. Pairs with
        ``t^2 < 1e-3`` are recomputed in fp64 from the difference of the rows. One clamp: ``t >= 1e-6``, and a clamped
        pair has no gradient. Zero rows stay zero vectors, with zero gradient. NaN or infinity in, NaN
        out. Differentiable once, in tiles: no n x n matrix exists in either pass. The order of the sums is fixed.
        Reverse mode by ``torch.autograd`` only: torch gives such an operation a zero tangent in forward mode
        (``torch.func.jvp``), and refuses it in ``torch.func.grad``.

    Source:
        SPHERE, arXiv 2510.01172; half space and angle: Liu et al., arXiv 1805.09298.
    """
    check_energy(weight, s, reduction, distance, half_space, impl)
    if impl == "cuda" and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError('impl="cuda" has no backward pass: take "triton" for a weight that requires grad')
    points = weight.shape[-2] * (1 + half_space)
    pairs = ordered_pairs(points) if reduction == "mean" else 1
    energy = ops.pair_energy(weight, float(s), distance, half_space, impl)
    if reduction == "none":
        return energy
    scale = (1 + half_space) / pairs
    return energy.sum(-1) if scale == 1 else energy.sum(-1) * scale


def orthogonal_energy(
    n: int, s: float = 1.0, *, distance: str = "euclidean", half_space: bool = False, reduction: str = "sum"
) -> float:
    """Energy of n orthogonal rows: what `hyperspherical_energy` is compared with.

    Args:
        n: number of neurons, >= 0.
        s, distance, half_space: as for `hyperspherical_energy`.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        For the Euclidean sum ``n (n - 1) 2^(-s/2)`` (``s > 0``); the unit rows are taken to be of length 1 exactly.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range; a mean over fewer than two rows.

    Source:
        The identity ``t^2 = 2 - 2 g`` at ``g = 0``; opposite rows (half space) at ``g = -1``.
    """
    checks.integer("n", n, low=0)
    check_options(s, distance, half_space)
    checks.choice("reduction", reduction, ("sum", "mean"))
    right, opposite = (math.pi / 2, math.pi) if distance == "angular" else (math.sqrt(2), 2.0)
    points = 2 * n if half_space else n
    opposites = points if half_space else 0
    total = (points * (points - 1) - opposites) * _riesz(right, s) + opposites * _riesz(opposite, s)
    return total / ordered_pairs(points) if reduction == "mean" else total


def _riesz(t: float, s: float) -> float:
    return -math.log(t) if s == 0 else t**-s
