"""Gram matrices: inner products of neurons, kept current while a weight takes low-rank updates."""

from __future__ import annotations

import torch
from torch import Tensor

from sphere_kernels.energy.validation import check_options
from sphere_kernels.gram import ops
from sphere_kernels.gram.validation import check_gram, check_kept, check_update


def gram(weight: Tensor, *, normalize: bool = False, impl: str = "auto") -> Tensor:
    """Inner products of the rows of a weight, ``W W^T``.

    Args:
        weight: ``[..., n, d]``, one neuron per row; float64, float32, bfloat16 or float16, on any device, any strides.
        normalize: take the unit rows ``w / (|w| + 1e-8)`` instead.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        ``[..., n, n]``, float64 for a float64 weight, else float32; contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype or shape; an ``impl`` that cannot run.

    Numerics:
        Inner products are computed in fp32 (fp64 for a float64 weight), norms in fp64. Exactly symmetric: one triangle
        is computed and mirrored. Zero rows stay zero, with zero gradient where ``normalize``. Differentiable;
        reverse mode only.

    Source:
        The row products that SPHERE, arXiv 2510.01172, takes its energy and its directions from.
    """
    check_gram(weight, normalize, impl)
    return ops.gram(weight, normalize, impl)


@torch.no_grad()
def gram_energy(
    gram: Tensor,
    s: float = 1.0,
    *,
    weight: Tensor | None = None,
    distance: str = "euclidean",
    half_space: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Energy of the neurons whose inner products a Gram matrix holds; the matrix is only read.

    Args:
        gram: ``[..., n, n]`` float32 or float64, symmetric, not normalised (`gram` of the weight).
        s, distance, half_space: as for `hyperspherical_energy`.
        weight: ``[..., n, d]``, the weight; float64, float32, bfloat16 or float16, same device. It serves the pairs of
            nearly coincident rows only.
        impl: implementation, see `sphere_kernels.dispatch.select`; CUDA has none.

    Returns:
        float64 ``[..., n]``, the energy of each neuron, as ``hyperspherical_energy(reduction="none")``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; an ``impl`` that cannot
            run.

    Numerics:
        As `gram_update_energy_` takes the energy of its result. Not differentiable: it runs under ``no_grad``.

    Source:
        The energy of SPHERE, arXiv 2510.01172, from inner products.
    """
    check_kept(gram, weight, impl)
    check_options(s, distance, half_space)
    return ops.gram_energy(gram.detach(), weight, float(s), distance, half_space, impl)


@torch.no_grad()
def gram_update_energy_(
    gram: Tensor,
    left: Tensor,
    cross: Tensor,
    inner: Tensor,
    s: float = 1.0,
    *,
    weight: Tensor | None = None,
    distance: str = "euclidean",
    half_space: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Carry a Gram matrix over a low-rank update of its weight, in place, and take the energy of the result.

    For ``W' = W + R X`` with ``M = W W^T``: ``M' = M + Z R^T + R Z^T + R (X X^T) R^T``, ``Z = W X^T``. One pass over
    ``M`` writes ``M'`` and sums the energy of each neuron.

    Args:
        gram: ``[..., n, n]`` float32 or float64, symmetric, not normalised (`gram` of the weight); overwritten. A
            strided view is written through. It must not share memory with the other arguments.
        left: ``[..., n, b]``, ``R``; dtype and device of ``gram``. ``b = 0`` leaves ``gram`` as it is.
        cross: ``[..., n, b]``, ``Z = W X^T`` of the weight **before** the update; dtype and device of ``gram``.
        inner: ``[..., b, b]``, ``X X^T``, symmetric; dtype and device of ``gram``.
        s, distance, half_space: as for `hyperspherical_energy`.
        weight: ``[..., n, d]``, the weight **after** the update; float64, float32, bfloat16 or float16, same device. It
            serves the pairs of nearly coincident rows only.
        impl: implementation, see `sphere_kernels.dispatch.select`.

    Returns:
        float64 ``[..., n]``, the energy of each neuron, as ``hyperspherical_energy(reduction="none")``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range, or a ``gram`` that does not
            own its elements; an ``impl`` that cannot run. Nothing is written then.

    Numerics:
        The update is computed in the dtype of ``gram``, its diagonal in fp64 and rounded once. Only the upper triangle
        is read; the result is exactly symmetric. Norms (``sqrt`` of the stored diagonal, 0 for a negative one) and all
        that follows are fp64; native, Triton and CUDA round the unit rows' inner products to the dtype of ``gram``, in
        fp32 about 1e-8 of a neuron's energy, which averages out over neurons. Pairs with ``t^2 < 1e-3`` are recomputed
        in fp64 from the rows of ``weight``. Without it they come from ``M``, whose rounding is absolute in ``t^2``: a
        pair at distance t is off by about ``s eps / t^2`` of its energy (eps 6e-8 in fp32, growing with the square root
        of the number of updates), so below ``t = 3e-4`` in fp32, 1e-8 in fp64, it is noise. Likewise a row that updates
        cancel is zero only up to that rounding. One clamp: ``t >= 1e-6``. NaN or infinity in, NaN out for each neuron
        that meets it. Not differentiable: it runs under ``no_grad``.

    Source:
        ``(W + R X)(W + R X)^T`` multiplied out; the energy of SPHERE, arXiv 2510.01172.
    """
    check_update(gram, left, cross, inner, weight, impl)
    check_options(s, distance, half_space)
    return ops.gram_update_energy_(gram.detach(), left, cross, inner, weight, float(s), distance, half_space, impl)
