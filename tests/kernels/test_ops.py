"""The registered operations: schemas, fakes, autograd, torch.compile."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from cases import VARIANTS, crowded, randn
from torch.library import opcheck

from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    dispatch,
    gram,
    gram_energy,
    gram_update_energy_,
    hyperspherical_energy,
    sparse_projection,
)
from sphere_kernels.energy import ops as energy_ops
from sphere_kernels.gram import ops as gram_ops
from sphere_kernels.projection import ops as projection_ops


def basis_of(d, r, dtype=torch.float64):
    return torch.linalg.qr(randn(d, r, seed=5)).Q.to(dtype)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_opcheck_energy(dtype, distance, half_space):
    for weight in (randn(2, 6, 4, dtype=dtype), crowded().to(dtype), randn(4, 6, dtype=dtype).T):
        options = (1.0, distance, half_space, "auto")
        opcheck(energy_ops.pair_energy, (weight.detach().requires_grad_(), *options))
        opcheck(energy_ops.pair_energy_backward, (randn(*weight.shape[:-1]), weight, *options))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_opcheck_projection(dtype):
    basis = basis_of(5, 2, dtype)
    for update in (randn(3, 4, 5, dtype=dtype), randn(5, 4, dtype=dtype).T):
        opcheck(projection_ops.sparse_projection, (update.detach().requires_grad_(), basis, 0.5, "auto"))
    for left, right in ((None, randn(4, 5, dtype=dtype)), (randn(4, 2, dtype=dtype), randn(2, 5, dtype=dtype))):
        for weight in (randn(4, 5, dtype=dtype), randn(5, 4, dtype=dtype).T):
            opcheck(projection_ops.apply_projected_update_, (weight, left, right, basis, 0.5, "auto"))


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_opcheck_gram(dtype, normalize):
    for weight in (randn(2, 6, 4, dtype=dtype), randn(4, 6, dtype=dtype).T):
        opcheck(gram_ops.gram, (weight.detach().requires_grad_(), normalize, "auto"))


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_opcheck_gram_update(dtype, distance, half_space):
    for leading, weight in (((2,), randn(2, 6, 4, dtype=torch.bfloat16)), ((), None)):
        factors = (randn(*leading, 6, b, dtype=dtype) for b in (3, 3))
        inner, matrix = randn(*leading, 3, 3, dtype=dtype), gram(randn(*leading, 6, 9, dtype=dtype))
        opcheck(
            gram_ops.gram_update_energy_,
            (matrix, *factors, inner @ inner.mT, weight, 1.0, distance, half_space, "auto"),
        )


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_opcheck_gram_energy(dtype, distance, half_space):
    for leading, weight in (((2,), randn(2, 6, 4, dtype=torch.bfloat16)), ((), None)):
        matrix = gram(randn(*leading, 6, 9, dtype=dtype))
        opcheck(gram_ops.gram_energy, (matrix, weight, 1.0, distance, half_space, "auto"))


def test_writes_that_torch_does_not_see_count_as_changes(monkeypatch):
    def write(weight, left, right, basis, alpha):
        weight.numpy()[:] = 0

    monkeypatch.setitem(
        dispatch.operation("apply_projected_update_").implementations,
        "reference",
        SimpleNamespace(run=write, supports=lambda *tensor: None),
    )
    weight = torch.nn.Parameter(randn(4, 5))
    loss = weight.square().sum()
    apply_projected_update_(weight, randn(4, 5), basis_of(5, 2), impl="reference")
    assert weight.abs().max() == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_compile_energy(distance, half_space):
    def loss(weight):
        options = {"distance": distance, "half_space": half_space}
        each = hyperspherical_energy(weight, 1.0, reduction="none", **options)
        return each.square().mean() + hyperspherical_energy(2 * weight, 2.0, reduction="mean", **options)

    expected, actual = randn(7, 5).requires_grad_(), randn(7, 5).requires_grad_()
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(actual).backward()
    torch.testing.assert_close(actual.grad, expected.grad)


def test_compile_projection():
    basis, left, right = basis_of(5, 2), randn(4, 2), randn(2, 5)

    def step(weight, update):
        apply_projected_update_(weight, update, basis, 0.8)
        apply_projected_update_(weight, LowRankUpdate(left, right), basis)
        return sparse_projection(update, basis).square().sum() + weight.sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight, update = randn(4, 5, seed=3), randn(4, 5, seed=4).requires_grad_()
        run(weight, update).backward()
        results.append((weight, update.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_compile_gram(distance, half_space):
    def loss(weight, left, right):
        matrix = gram(weight)
        cosines = gram(weight, normalize=True)
        state, factors = matrix.detach().clone(), (left, weight.detach() @ right.mT, right @ right.mT)
        options = {"distance": distance, "half_space": half_space}
        first = gram_update_energy_(state, *factors, weight=weight + left @ right, **options)
        again = gram_energy(state, **options)
        return matrix.square().sum() + cosines.pow(3).sum() * again.mean(), first, again, state

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        weight = randn(7, 5).requires_grad_()
        total, *rest = run(weight, randn(7, 2, seed=1), randn(2, 5, seed=2))
        total.backward()
        results.append((weight.grad, *rest))
    torch.testing.assert_close(results[1], results[0])


def test_compile_with_changing_sizes():
    compiled = torch.compile(hyperspherical_energy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, d in itertools.product((4, 9), (3, 5)):
        weight = randn(n, d)
        torch.testing.assert_close(compiled(weight), hyperspherical_energy(weight))
