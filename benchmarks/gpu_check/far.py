"""Offsets past 2^31: a weight with more elements than that, and a Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import Case, Row, Skipped, Wrong
from benchmarks.gpu_check.device import Target
from benchmarks.gpu_check.plain import product
from benchmarks.gpu_check.yardstick import Kind, eps_of, kinds, twice, under, within
from sphere_kernels import LowRankUpdate, apply_projected_update_, gram, hyperspherical_energy

import oracle  # isort: skip  (from the kernel tests, see yardstick)

COLUMNS = 1 << 18  # columns multiplied at a time


def probes(device: Target, impl: str) -> Iterator[Case]:
    name = "more than 2^31 elements"
    for op, case, judge in (
        ("pair_energy", "energy", _energy),
        ("pair_energy_backward", "gradient", _gradient),
        ("apply_projected_update_", "apply_projected_update_", _application),
    ):
        for kind in kinds(device, op, impl):
            if kind.dtype == torch.bfloat16:
                yield Case(kind.info(case, name), under(kind, partial(judge, device, kind)))
    for kind in kinds(device, "gram", impl):
        if kind.dtype == torch.bfloat16:
            yield Case(kind.info("gram", "n * n past 2^31"), under(kind, partial(_gram, device, kind)))


def _weight(device: Target, kind: Kind, copies: float) -> Tensor:
    """A random weight of the far size, if ``copies`` times the memory is free."""
    n, d = device.sizes.far
    _room(device, n * d * kind.dtype.itemsize * copies)
    generator = torch.Generator(device.torch).manual_seed(0)
    return torch.randn(n, d, generator=generator, device=device.torch, dtype=kind.dtype)


def _room(device: Target, needed: float) -> None:
    free = device.free()
    if free < needed:
        raise Skipped(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


def _grams(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """``W W^T`` in fp64 and in the kind's arithmetic, `COLUMNS` columns at a time."""
    exact = weight.new_zeros(len(weight), len(weight), dtype=torch.float64)
    plain = exact.to(kind.computed)
    for columns in weight.split(COLUMNS, 1):
        exact += columns.double() @ columns.double().T
        plain += product(columns.to(kind.computed), columns.to(kind.computed).T, kind.plain)
    return exact, plain


def _energy(device: Target, kind: Kind) -> Row:
    weight = _weight(device, kind, 2.5)
    actual = twice(device, lambda: hyperspherical_energy(weight, reduction="none", impl=kind.impl))
    exact, plain = (oracle.per_neuron_of_gram(matrix) for matrix in _grams(weight, kind))
    return within(actual, exact, plain, kind.eps) | {"shape": list(weight.shape)}


def _gradient(device: Target, kind: Kind) -> Row:
    """Check the last rows, with the largest offsets, against fp64 in the first and the last columns."""
    weight = _weight(device, kind, 6)
    leaf = weight.requires_grad_()
    (found,) = torch.autograd.grad(hyperspherical_energy(leaf, impl=kind.impl), leaf)
    weight = weight.detach()
    results = []
    for matrix in _grams(weight, kind):
        scale = 1 / (matrix.diagonal().double().sqrt() + oracle.EPSILON)
        slopes = (2 - 2 * matrix.double() * scale * scale[:, None]).clamp(min=1e-12).pow(-1.5).fill_diagonal_(0)
        unit = torch.cat([weight[:, :64], weight[:, -64:]], 1).double() * scale[:, None]
        inner = (slopes * (matrix.double() * scale * scale[:, None])).sum(1, keepdim=True)
        results.append(2 * (slopes @ unit - inner * unit) * scale[:, None])
    actual = torch.cat([found[:, :64], found[:, -64:]], 1)
    return within(actual, results[0], results[1].to(kind.dtype), eps_of(kind.dtype)) | {"shape": list(weight.shape)}


def _application(device: Target, kind: Kind) -> Row:
    weight = _weight(device, kind, 3)
    n, d = weight.shape
    generator = torch.Generator(device.torch).manual_seed(1)
    left, right, basis = (
        torch.randn(*shape, generator=generator, device=device.torch, dtype=torch.float32) / shape[-1] ** 0.5
        for shape in ((n, 3), (3, d), (d, 2))
    )
    basis /= basis.norm(dim=0)
    before = weight.clone()
    apply_projected_update_(weight, LowRankUpdate(left, right), basis, 0.5, impl=kind.impl)
    results = []
    for dtype in (torch.float64, torch.float32):
        a, x, u = (tensor.to(dtype) for tensor in (left, right, basis))
        x = x - 0.5 * product(product(x, u, kind.plain), u.T, kind.plain)
        ends = [
            before[:, part].to(dtype) + product(a, x[:, part], kind.plain) for part in (slice(64), slice(-64, None))
        ]
        results.append(torch.cat(ends, 1))
    actual = torch.cat([weight[:, :64], weight[:, -64:]], 1)
    return within(actual, results[0], results[1].to(kind.dtype), eps_of(kind.dtype)) | {"shape": [n, d]}


def _gram(device: Target, kind: Kind) -> Row:
    """Check some rows and the mirrored columns of a matrix whose last element lies past 2^31."""
    n, d = device.sizes.wide, 16
    _room(device, 4.5 * n * n)
    generator = torch.Generator(device.torch).manual_seed(0)
    weight = torch.randn(n, d, generator=generator, device=device.torch, dtype=kind.dtype)
    found = gram(weight, impl=kind.impl)
    rows = torch.tensor([0, n // 2, n - 2, n - 1], device=device.torch)
    if not torch.equal(found[rows], found[:, rows].T):
        raise Wrong("the matrix is not exactly symmetric", {})
    exact, wide = weight.double(), weight.float()
    plain = product(wide[rows], wide.T, kind.plain)
    return within(found[rows], exact[rows] @ exact.T, plain, kind.eps) | {"shape": [n, n]}
