"""Checks of code built on the kernels: directions, the streaming engine, ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import Case, Row, Wrong
from benchmarks.gpu_check.device import Target
from benchmarks.gpu_check.plain import multiply, product
from benchmarks.gpu_check.yardstick import (
    PLAIN,
    Kind,
    bits,
    first_kind,
    kinds,
    randn,
    twice,
    under,
    within,
)
from sphere_kernels import (
    hyperspherical_energy,
    principal_directions,
)
from sphere_kernels.streaming import HypersphereState

import oracle  # isort: skip


def checks(device: Target, impl: str) -> Iterator[Case]:
    for make in (directions, streams, compiled):
        yield from make(device, impl)


def directions(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "principal_directions", impl):
        n, d = device.sizes.usual
        for shape in ((2, d, n), (n, d)):
            run = partial(_directions, device, kind, shape)
            yield Case(kind.info("principal_directions", " x ".join(map(str, shape))), under(kind, run))


def _directions(device: Target, kind: Kind, shape: tuple[int, ...]) -> Row:
    """Check ranks, eigenvalues, orthonormality, and the energy that the basis holds."""
    weight = randn(device, *shape, dtype=kind.dtype)
    few = 3 if shape[-2] < shape[-1] else 4  # numbers read: soundness of norms, rank, spread of eigenvalues

    def run() -> tuple[Tensor, ...]:
        found = principal_directions(weight, 0.5, impl=kind.impl)
        return found.basis, found.eigenvalues, found.rank

    basis, values, rank = twice(device, run, host=few)
    unit = oracle.unit_rows(weight.double())
    expected = torch.linalg.svdvals(unit).square() / shape[-2]
    counted = _shares(expected) <= 0.5
    if ((rank - counted.sum(-1) - 1).abs() > (kind.dtype != torch.float64)).any():
        raise Wrong(f"rank {rank.tolist()}, expected {(counted.sum(-1) + 1).tolist()}", {})
    rows = unit.to(kind.computed)
    rows = rows if shape[-2] <= shape[-1] else rows.mT
    plain, vectors = torch.linalg.eigh(product(rows, rows.mT, kind.plain) / shape[-2])
    plain, vectors = plain.flip(-1).clamp(min=0), vectors.flip(-1)[..., : basis.shape[-1]]
    if shape[-2] <= shape[-1]:
        scale = (plain[..., : basis.shape[-1]] * shape[-2]).rsqrt().unsqueeze(-2)
        vectors = product(rows.mT.contiguous(), vectors * scale, kind.plain)
    own = torch.arange(basis.shape[-1], device=rank.device) < rank.unsqueeze(-1)
    judged = [_soundness(u.double() * own.unsqueeze(-2), unit, expected, rank) for u in (basis, vectors)]
    ideal = torch.ones_like(judged[0])
    eps = 20 * kind.eps  # LAPACK's bound for eigenvalues and for the energy of a basis
    return within((values, judged[0]), (expected, ideal), (plain, judged[1]), eps) | {"rank": rank.tolist()}


def _shares(values: Tensor) -> Tensor:
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


def _soundness(basis: Tensor, unit: Tensor, values: Tensor, rank: Tensor) -> Tensor:
    """Two figures that are ideally 1: 1 plus the distance from orthonormal columns; and the energy held, over the most
    that as many directions can hold."""
    inner = basis.mT @ basis
    skew = (inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.5).double())).abs().amax((-2, -1))
    can = _shares(values).gather(-1, (rank - 1).unsqueeze(-1)).squeeze(-1) * values.sum(-1) * unit.shape[-2]
    return torch.stack([1 + skew, (unit @ basis).square().sum((-2, -1)) / can])


def streams(device: Target, impl: str) -> Iterator[Case]:
    for kind in kinds(device, "gram_update_energy_", impl):
        if set(kinds(device, "products", impl)) >= {kind}:
            yield Case(
                kind.info("streaming", "energy after three updates"), under(kind, partial(_stream, device, kind))
            )


def _stream(device: Target, kind: Kind) -> Row:
    n, d = device.sizes.usual

    def run() -> tuple[Tensor, ...]:
        weight = randn(device, n, d, dtype=kind.dtype)
        state = HypersphereState(weight, alpha=0.0, impl=kind.impl)
        for k in range(3):
            left, right = (0.1 * randn(device, *shape, seed=k) for shape in ((n, 4), (4, d)))
            state.update_(left.to(kind.computed), right.to(kind.computed))
        return state.neuron_energy, state.master

    energies, master = twice(device, run, host=None)
    expected = oracle.per_neuron(master)
    plain = oracle.plain(master, *PLAIN, multiply(kind.plain))
    return within(energies, expected, plain, 10 * kind.eps)  # three updates, each rounded


def compiled(device: Target, impl: str) -> Iterator[Case]:
    kind = first_kind(device, "pair_energy_backward", impl)
    if kind:
        yield Case(kind.info("energy", "torch.compile, fullgraph"), under(kind, partial(_compiled, device, kind)))


def _compiled(device: Target, kind: Kind) -> Row:
    """Check for equal bits with and without `torch.compile`, and for graphs without breaks in the operations."""
    weight = randn(device, *device.sizes.usual, dtype=kind.dtype)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.detach().requires_grad_()
        total = hyperspherical_energy(leaf, impl=kind.impl)
        total.backward()
        assert leaf.grad is not None
        return total.detach(), leaf.grad

    def traced(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.detach().requires_grad_()
        total = torch.compile(
            lambda w: hyperspherical_energy(w, impl=kind.impl), backend=device.compiler, fullgraph=True
        )(leaf)
        total.backward()
        assert leaf.grad is not None
        return total.detach(), leaf.grad

    for a, b in zip(both(weight), traced(weight), strict=True):
        if not torch.equal(bits(a), bits(b)):
            raise Wrong("torch.compile changes the bits", {})
    return {}
