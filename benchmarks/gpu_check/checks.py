"""The checks of values: every operation, implementation and way to multiply, against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check import composed, far, matrices
from benchmarks.gpu_check.cases import Case, Row, Wrong
from benchmarks.gpu_check.device import IMPLS, Target
from benchmarks.gpu_check.plain import multiply
from benchmarks.gpu_check.yardstick import (
    ALL,
    FEW,
    HALF,
    PLAIN,
    Judge,
    Kind,
    Variant,
    at_edges,
    eps_of,
    first_kind,
    kinds,
    layouts,
    randn,
    row_by_row,
    title,
    twice,
    under,
    within,
)
from sphere_kernels import hyperspherical_energy

import cases as inputs  # isort: skip  (from the kernel tests, see yardstick)
import oracle  # isort: skip


def checks(device: Target) -> Iterator[Case]:
    """Every check, for every implementation that the device may have."""
    for impl in IMPLS:
        for make in (energies, matrices.checks, composed.checks, far.probes):
            yield from make(device, impl)


def energy(weight: Tensor, impl: str, variant: Variant = PLAIN) -> Tensor:
    s, distance, half_space = variant
    return hyperspherical_energy(weight, s, reduction="none", distance=distance, half_space=half_space, impl=impl)


def gradient(weight: Tensor, upstream: Tensor, impl: str, variant: Variant = PLAIN) -> Tensor:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(energy(leaf, impl, variant), leaf, upstream.double())[0]


def energies(device: Target, impl: str) -> Iterator[Case]:
    first = first_kind(device, "pair_energy", impl)
    backward = set(kinds(device, "pair_energy_backward", impl))
    for kind in kinds(device, "pair_energy", impl):
        passes: list[tuple[str, Judge]] = [("energy", _energy_within)]
        if kind in backward:
            passes.append(("gradient", _gradient_within))
        variants = ALL if kind == first or kind.dtype == torch.float64 else FEW
        if device.rehearsed:
            variants = FEW if kind == first else FEW[:1]
        for variant in variants:
            for op, judge in passes:
                run = partial(judge, device, kind, randn(device, *device.sizes.usual, dtype=kind.dtype), variant)
                yield Case(kind.info(op, title(variant)), under(kind, run))
        for op, judge in passes:
            yield Case(kind.info(op, "sizes off the block edges"), under(kind, partial(at_edges, device, kind, judge)))
        yield Case(kind.info("energy", "batches, strides"), under(kind, partial(layouts, device, kind, energy)))
        for d in device.sizes.depths:
            yield Case(kind.info("energy", f"d = {d}"), under(kind, partial(_depth, device, kind, d)))
        yield Case(kind.info("energy", "NaN stays with its matrix"), under(kind, partial(_nan, device, kind)))
        near: list[Variant] = [(1.0, *variant) for variant in inputs.VARIANTS]
        for variant in near if not device.rehearsed else near[::3] if kind == first else []:
            run = partial(_near, device, kind, variant, kind in backward and kind.dtype not in HALF)
            yield Case(kind.info("energy", f"near pairs {variant[1]}{' half' * variant[2]}"), under(kind, run))


def _energy_within(device: Target, kind: Kind, weight: Tensor, variant: Variant) -> Row:
    actual = twice(device, lambda: energy(weight, kind.impl, variant))
    expected = oracle.per_neuron(weight, *variant)
    plain = oracle.plain(weight.to(kind.computed), *variant, multiply(kind.plain))
    return within(actual, expected, plain, kind.eps)


def _gradient_within(device: Target, kind: Kind, weight: Tensor, variant: Variant) -> Row:
    upstream = randn(device, *weight.shape[:-1], seed=2)
    actual = twice(device, lambda: gradient(weight, upstream, kind.impl, variant))
    expected = oracle.gradient(weight, upstream, *variant)
    leaf = weight.detach().to(kind.computed).requires_grad_()
    (oracle.plain(leaf, *variant, multiply(kind.plain)) * upstream).sum().backward()
    assert leaf.grad is not None
    return within(actual, expected, leaf.grad.to(kind.dtype), max(kind.eps, eps_of(kind.dtype)))


def _depth(device: Target, kind: Kind, d: int) -> Row:
    """Error over the length of inner products, beside the error of plain fp32: tensor cores truncate sums."""
    weight = randn(device, device.sizes.usual[0], d, dtype=kind.dtype)
    (actual,) = twice(device, lambda: energy(weight, kind.impl))
    expected = oracle.per_neuron_of_gram(weight.double() @ weight.double().mT)  # differences would take gigabytes
    plain = oracle.plain(weight.to(kind.computed), *PLAIN, multiply(kind.plain))
    found = within(actual, expected, plain, kind.product_eps)
    fp32 = oracle.plain(weight.float(), *PLAIN, multiply("ieee")).double()
    off = actual / expected - 1
    relative = {"relative": float(off.abs().max()), "relative_plain_fp32": float((fp32 / expected - 1).abs().max())}
    return found | relative | {"d": d, "bias": float(off.mean())}


def _nan(device: Target, kind: Kind) -> Row:
    n, d = device.sizes.usual
    weight = randn(device, 2, n, d, dtype=kind.dtype)
    weight[1, n // 2, d // 2] = float("nan")
    found = twice(device, lambda: energy(weight, kind.impl))[0]
    if not found[1].isnan().all() or found[0].isnan().any():
        raise Wrong("NaN in one matrix of a batch must give NaN there, and only there", {})
    return {}


def _near(device: Target, kind: Kind, variant: Variant, backward: bool) -> Row:
    """Check duplicates, antipodes, zero rows, and near pairs across tiles."""
    n, d = 0 if device.rehearsed else 120, 9
    order = torch.randperm(24 + n, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([inputs.crowded(), inputs.randn(n, d, seed=3)])[order].to(device.torch, kind.dtype)
    loose = {"tf32": 1e-2, "": 1e-9 if kind.dtype == torch.float64 else 1e-4}.get(kind.dot, 1e-4)
    actual = twice(device, lambda: energy(weight, kind.impl, variant))[0]
    found = row_by_row(actual, oracle.per_neuron(weight, *variant), loose)
    if backward:
        upstream = randn(device, len(weight), seed=2)
        actual = twice(device, lambda: gradient(weight, upstream, kind.impl, variant))[0]
        # Rounding alone decides the direction of the angle between duplicates.
        loose = {"tf32": 5e-2, "": 1e-5 if variant[1] == "angular" else 1e-10}.get(kind.dot, 2e-5)
        found |= {"gradient_" + k: v for k, v in _rows_of_gradient(actual, weight, upstream, variant, loose).items()}
    return found


def _rows_of_gradient(actual: Tensor, weight: Tensor, upstream: Tensor, variant: Variant, tolerance: float) -> Row:
    return row_by_row(actual, oracle.gradient(weight, upstream, *variant), tolerance)
