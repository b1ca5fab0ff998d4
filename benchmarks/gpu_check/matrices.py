"""Checks of Gram matrices, updates of Gram matrices, projections and products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import Case, Row, Wrong
from benchmarks.gpu_check.device import Target
from benchmarks.gpu_check.plain import product
from benchmarks.gpu_check.yardstick import (
    FEW,
    Kind,
    Variant,
    at_edges,
    eps_of,
    kinds,
    layouts,
    randn,
    row_by_row,
    title,
    twice,
    under,
    within,
)
from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    gram,
    gram_energy,
    gram_update_energy_,
    sparse_projection,
)
from sphere_kernels._products import products_for

import cases as inputs  # isort: skip  (from the kernel tests, see yardstick)
import oracle  # isort: skip

ALPHA = 0.7


def checks(device: Target, impl: str) -> Iterator[Case]:
    for make in (grams, energies, updates, projections, products):
        yield from make(device, impl)


def grams(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "gram", impl):
        for normalize in (False, True):
            name = "unit rows" if normalize else "rows"
            yield Case(kind.info("gram", name), under(kind, partial(_gram_of_edges, device, kind, normalize)))
        compute = lambda weight, impl: gram(weight, impl=impl)  # noqa: E731
        yield Case(kind.info("gram", "batches, strides"), under(kind, partial(layouts, device, kind, compute)))
        for d in device.sizes.depths:
            yield Case(kind.info("gram", f"d = {d}"), under(kind, partial(_depth, device, kind, d)))


def _gram_of_edges(device: Target, kind: Kind, normalize: bool) -> Row:
    return at_edges(device, kind, lambda *given: _gram_within(*given[:3], normalize))


def _gram_within(device: Target, kind: Kind, weight: Tensor, normalize: bool) -> Row:
    (actual,) = twice(device, lambda: gram(weight, normalize=normalize, impl=kind.impl))
    if not torch.equal(actual, actual.mT):
        raise Wrong("the matrix is not exactly symmetric", {})
    rows, exact = (
        oracle.unit_rows(weight.to(dtype)) if normalize else weight.to(dtype)
        for dtype in (kind.computed, torch.float64)
    )
    return within(actual, exact @ exact.mT, product(rows, rows.mT, kind.plain), kind.product_eps)


def _depth(device: Target, kind: Kind, d: int) -> Row:
    """Error over the length of sums, beside the error of plain fp32: tensor cores truncate sums."""
    weight = randn(device, device.sizes.usual[0], d, dtype=kind.dtype)
    found = _gram_within(device, kind, weight, False)
    exact = weight.double() @ weight.double().mT
    size = exact.abs().max()
    fp32 = product(weight.float(), weight.float().mT, "ieee")
    actual = gram(weight, impl=kind.impl)
    return found | {
        "d": d,
        "relative": float((actual - exact).abs().max() / size),
        "relative_plain_fp32": float((fp32 - exact).abs().max() / size),
        "bias": float((actual.diagonal() / exact.diagonal() - 1).mean()),
    }


def energies(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "gram_energy", impl, wide=True):
        for variant in FEW:
            run = partial(_energy_of_gram, device, kind, variant)
            yield Case(kind.info("gram_energy", title(variant)), under(kind, run))
        yield Case(kind.info("gram_energy", "near pairs"), under(kind, partial(_energy_of_near_pairs, device, kind)))


def _energy_of_gram(device: Target, kind: Kind, variant: Variant) -> Row:
    weight = randn(device, *device.sizes.usual, dtype=torch.float64)
    matrix = (weight @ weight.mT).to(kind.dtype)
    matrix = (matrix + matrix.mT) / 2
    s, distance, half_space = variant
    (actual,) = twice(device, lambda: gram_energy(matrix, s, distance=distance, half_space=half_space, impl=kind.impl))
    expected, plain = (oracle.per_neuron_of_gram(m, s, distance, half_space) for m in (matrix.double(), matrix))
    return within(actual, expected, plain, _own_error(kind))


def _energy_of_near_pairs(device: Target, kind: Kind) -> Row:
    _, _, crowded = inputs.update_to_crowded(kind.dtype)
    crowded = crowded.to(device.torch)
    matrix, weight = (crowded @ crowded.mT).to(kind.dtype), crowded.to(kind.dtype)
    (actual,) = twice(device, lambda: gram_energy(matrix, weight=weight, impl=kind.impl))
    return row_by_row(actual, oracle.per_neuron(crowded), _loose(kind))


def _own_error(kind: Kind) -> float:
    """In fp64 the oracle has an error of its own: arccos of a rounded number."""
    return 5e3 * kind.eps if kind.dtype == torch.float64 else kind.eps


def _loose(kind: Kind) -> float:
    return {"tf32": 1e-2, "": 1e-9}.get(kind.dot, 2e-4)


def updates(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "gram_update_energy_", impl, wide=True):
        for variant in FEW:
            name = title(variant)
            yield Case(kind.info("gram_update_energy_", name), under(kind, partial(_update, device, kind, variant)))
        run = partial(_update_to_near_pairs, device, kind)
        yield Case(kind.info("gram_update_energy_", "near pairs"), under(kind, run))


def _update(device: Target, kind: Kind, variant: Variant) -> Row:
    _update_of(device, kind, variant, 0)
    return _update_of(device, kind, variant, 5)


def _update_of(device: Target, kind: Kind, variant: Variant, b: int) -> Row:
    n, d = device.sizes.usual
    given, _ = inputs.update_inputs(inputs.randn(2, n, d), b, kind.dtype)
    matrix, left, cross, inner = (tensor.to(device.torch) for tensor in given)
    matrix = matrix.triu()  # below the diagonal nothing is read
    s, distance, half_space = variant

    def run() -> tuple[Tensor, ...]:
        target = matrix.clone()
        energies = gram_update_energy_(
            target, left, cross, inner, s, distance=distance, half_space=half_space, impl=kind.impl
        )
        return target, energies

    actual = twice(device, run)
    if not torch.equal(actual[0], actual[0].mT):
        raise Wrong("the matrix is not exactly symmetric", {})
    whole = matrix + matrix.triu(1).mT
    expected = _updated(*(tensor.double() for tensor in (whole, left, cross, inner)), torch.matmul)
    plain = _updated(whole, left, cross, inner, lambda a, b: product(a, b, kind.plain))
    energies = [oracle.per_neuron_of_gram(m, s, distance, half_space) for m in (expected, plain)]
    return within(actual, (expected, energies[0]), (plain, energies[1]), kind.product_eps, _own_error(kind))


def _updated(gram: Tensor, left: Tensor, cross: Tensor, inner: Tensor, times: Callable[..., Tensor]) -> Tensor:
    half = cross + times(left, inner) / 2
    return gram + times(torch.cat([half, left], -1), torch.cat([left, half], -1).mT)


def _update_to_near_pairs(device: Target, kind: Kind) -> Row:
    before, factors, after = inputs.update_to_crowded(kind.dtype)
    before, after = before.to(device.torch), after.to(device.torch)
    matrix, weight = (before @ before.mT).to(kind.dtype), after.to(kind.dtype)
    left, cross, inner = (factor.to(device.torch) for factor in factors)

    def run() -> Tensor:
        return gram_update_energy_(matrix.clone(), left, cross, inner, weight=weight, impl=kind.impl)

    return row_by_row(twice(device, run)[0], oracle.per_neuron(after), _loose(kind))


def projections(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "sparse_projection", impl):
        yield Case(kind.info("sparse_projection", ""), under(kind, partial(_projection, device, kind)))
    for kind in kinds(device, "apply_projected_update_", impl):
        for low_rank in (False, True):
            run = partial(_application, device, kind, low_rank)
            yield Case(kind.info("apply_projected_update_", "factors" if low_rank else "dense"), under(kind, run))


def _basis(device: Target, d: int, kind: Kind) -> Tensor:
    return torch.linalg.qr(inputs.randn(d, max(1, d // 3), seed=5)).Q.to(device.torch, kind.computed)


def _kept(update: Tensor, basis: Tensor, times: Callable[..., Tensor]) -> Tensor:
    return update - ALPHA * times(times(update, basis), basis.mT)


def _projection(device: Target, kind: Kind) -> Row:
    found: Row = {}
    for n, d in device.sizes.edges:
        update, basis = randn(device, 2, n, d, dtype=kind.dtype), _basis(device, d, kind)
        actual = twice(device, lambda u=update, b=basis: sparse_projection(u, b, ALPHA, impl=kind.impl))
        expected = _kept(update.double(), basis.double(), torch.matmul)
        plain = _kept(update.to(kind.computed), basis, lambda a, b: product(a, b, kind.plain)).to(kind.dtype)
        found = within(actual, expected, plain, max(kind.product_eps, eps_of(kind.dtype)))
    return found


def _application(device: Target, kind: Kind, low_rank: bool) -> Row:
    found: Row = {}
    times = lambda a, b: product(a, b, kind.plain)  # noqa: E731
    for n, d in device.sizes.edges:
        weight, dense = (randn(device, n, d, dtype=kind.dtype, seed=seed) for seed in (4, 6))
        left, right = (randn(device, *shape, dtype=kind.dtype, seed=8) for shape in ((n, 5), (5, d)))
        basis = _basis(device, d, kind)
        update = LowRankUpdate(left, right) if low_rank else dense

        def run(weight: Tensor = weight, update: Any = update, basis: Tensor = basis) -> tuple[Tensor, ...]:
            targets = weight.clone(), weight.T.clone(memory_format=torch.contiguous_format).T
            return tuple(apply_projected_update_(target, update, basis, ALPHA, impl=kind.impl) for target in targets)

        actual = twice(device, run)
        if not torch.equal(*actual):
            raise Wrong("a transposed weight gets other bits than a contiguous one", {})
        results = []
        for dtype, multiplied in ((torch.float64, torch.matmul), (kind.computed, times)):
            wide = [tensor.to(dtype) for tensor in (weight, left, right, dense, basis)]
            change = (
                multiplied(wide[1], _kept(wide[2], wide[4], multiplied)) if low_rank else _kept(*wide[3:], multiplied)
            )
            results.append(wide[0] + change)
        plain = results[1].to(kind.dtype)
        found = within(actual, (results[0],) * 2, (plain,) * 2, max(kind.product_eps, eps_of(kind.dtype)))
    return found


def products(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "products", impl, wide=True):
        yield Case(kind.info("products", ""), under(kind, partial(_products, device, kind)))


def _products(device: Target, kind: Kind) -> Row:
    found: Row = {}
    for n, d in device.sizes.edges:
        a, b, c = (
            randn(device, 2, *shape, dtype=kind.dtype, seed=s) for s, shape in enumerate(((n, d), (d, 20), (n, 20)))
        )
        backend = products_for(a, kind.impl)

        def run(a: Tensor = a, b: Tensor = b, c: Tensor = c, backend: Any = backend) -> tuple[Tensor, ...]:
            out, square = c.mT.clone(memory_format=torch.contiguous_format).mT, backend.gram(c)
            backend.add_(out, a, b)
            backend.subtract_gram_(square, a)
            return backend.matmul(a, b), out, backend.gram(b.mT), square

        actual = twice(device, run)
        results = []
        for dtype, times in ((torch.float64, torch.matmul), (kind.dtype, lambda a, b: product(a, b, kind.plain))):
            x, y, z = a.to(dtype), b.to(dtype), c.to(dtype)
            results.append((times(x, y), z + times(x, y), times(y.mT, y), times(z, z.mT) - times(x, x.mT)))
        found = within(actual, *results, kind.product_eps)
    return found
