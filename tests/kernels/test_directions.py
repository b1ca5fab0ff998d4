"""Principal directions against fp64 decompositions, by projector."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from cases import DTYPES, randn

from sphere_kernels import principal_directions
from sphere_kernels._products.reference import TORCH
from sphere_kernels.directions import spectrum
from sphere_kernels.directions.leading import leading_directions

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = ((20, 50), (50, 20), (16, 16), (1, 7), (7, 1), (3, 2))


def projector(basis):
    return basis.double() @ basis.double().mT


def exact(weight, rank):
    """Eigenvalues of C and the projector on its leading directions, from an SVD in fp64."""
    unit = oracle.unit_rows(weight.double())
    _, singular, right = torch.linalg.svd(unit, full_matrices=False)
    return singular.square() / weight.shape[-2], projector(right[:rank].mT)


def decaying(n, d, seed=0):
    """A matrix whose spectrum falls off, so that leading directions are well separated."""
    scale = 0.6 ** torch.arange(min(n, d), dtype=torch.float64)
    left, right = (torch.linalg.qr(randn(m, min(n, d), seed=seed + m)).Q for m in (n, d))
    return (left * scale) @ right.mT


@pytest.mark.parametrize("method", ("auto", "eigh", "svd"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_svd(shape, method):
    weight = randn(*shape)
    result = principal_directions(weight, 0.5, method=method)
    values, expected = exact(weight, int(result.rank))
    d, r = shape[1], int(result.rank)
    assert result.method == ("eigh" if method == "auto" else method)
    assert result.basis.shape == (d, r)
    assert result.rank.dtype == torch.int64
    assert r == min(oracle.rank_rule(values, 0.5), min(shape))
    torch.testing.assert_close(result.eigenvalues, values, rtol=0, atol=1e-14)
    torch.testing.assert_close(projector(result.basis), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(result.energy_ratio, values[:r].sum() / values.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ("eigh", "svd", "subspace"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((130, 300), (300, 130)), ids=str)
def test_orthonormal_eigenvectors(shape, dtype, method):
    weight = (randn(*shape) + 2 * randn(shape[0], 1, seed=3) * randn(1, shape[1], seed=4)).to(dtype)
    result = principal_directions(weight, 0.7, method=method)
    basis, eps = result.basis, torch.finfo(result.basis.dtype).eps
    r = int(result.rank)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (projector(basis.mT) - torch.eye(r)).abs().max() < 30 * eps
    moment = oracle.second_moment(weight)
    residual = moment @ basis.double() - basis.double() * result.eigenvalues[:r].double()
    assert residual.norm(dim=0).max() < max(20 * eps, eps**0.75 if method == "subspace" else 0) * moment.norm()


@pytest.mark.parametrize("shape", ((12, 40), (40, 12)), ids=str)
def test_small_directions_stay_orthonormal(shape):
    weight = decaying(*shape)
    result = principal_directions(weight.float(), rank=12)
    assert (projector(result.basis.mT) - torch.eye(result.basis.shape[1])).abs().max() < 1e-6


@pytest.mark.parametrize("energy_ratio", (0.0, 1e-9, 0.25, 0.5, 0.75, 0.9999, 1.0, 0, 1))
def test_rank_rule(energy_ratio):
    weight = randn(15, 22)
    values, _ = exact(weight, 1)
    result = principal_directions(weight, energy_ratio)
    assert int(result.rank) == min(oracle.rank_rule(values, energy_ratio), 15)
    assert result.energy_ratio > energy_ratio or int(result.rank) == 15


def test_rank_rule_counts_an_exact_hit():
    # Four equal eigenvalues: a cumulative share equal to the ratio counts as not yet passed.
    weight = 1e9 * torch.eye(4, dtype=torch.float64)
    assert [int(principal_directions(weight, q).rank) for q in (0.2, 0.25, 0.5, 0.74, 0.75)] == [1, 2, 3, 3, 4]


def test_rank_overrides_ratio():
    weight = randn(9, 14)
    for rank in (0, 1, 5, 9):
        result = principal_directions(weight, 0.1, rank=rank)
        assert result.basis.shape == (14, rank)
        assert int(result.rank) == rank
        values, expected = exact(weight, rank)
        torch.testing.assert_close(projector(result.basis), expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(result.energy_ratio, values[:rank].sum() / values.sum())


@pytest.mark.parametrize("method", ("eigh", "svd"))
@pytest.mark.parametrize("shape", ((10, 30), (30, 10)), ids=str)
def test_numerical_rank_bounds(shape, method):
    weight = randn(shape[0], 3) @ randn(3, shape[1], seed=1)
    for dtype in (torch.float64, torch.float32):
        for options in ({"energy_ratio": 1.0}, {"rank": 8}):
            assert int(principal_directions(weight.to(torch.float64).to(dtype), method=method, **options).rank) <= (
                3 if dtype == torch.float64 or method == "eigh" else 8
            )
    assert int(principal_directions(weight, 1.0, method=method).rank) == 3


def test_svd_resolves_what_the_gram_matrix_cannot():
    weight = decaying(30, 40) * torch.ones(30, 1)
    weight = torch.diag(10.0 ** -torch.arange(30, dtype=torch.float64) / 1) @ weight + decaying(30, 40)
    ranks = {method: int(principal_directions(weight.float(), 1.0, method=method).rank) for method in ("eigh", "svd")}
    assert ranks["eigh"] < ranks["svd"]


@pytest.mark.parametrize("method", ("eigh", "svd", "subspace"))
@pytest.mark.parametrize("shape", ((9, 21), (21, 9)), ids=str)
def test_batch_with_ragged_ranks(shape, method):
    flat, steep, thin = randn(*shape), decaying(*shape), randn(shape[0], 2) @ randn(2, shape[1], seed=1)
    weight = torch.stack([flat, steep, thin, flat]).reshape(2, 2, *shape)
    result = principal_directions(weight, 0.8, method=method)
    alone = [principal_directions(w, 0.8, method=method) for w in weight.flatten(0, 1)]
    ranks = [int(one.rank) for one in alone]
    assert len(set(ranks)) > 1
    assert result.rank.flatten().tolist() == ranks
    assert result.basis.shape == (2, 2, shape[1], max(ranks))
    for basis, one, rank in zip(result.basis.flatten(0, 1), alone, ranks, strict=True):
        assert basis[:, rank:].abs().sum() == 0
        torch.testing.assert_close(projector(basis), projector(one.basis), rtol=0, atol=1e-10)
    ratios = torch.stack([one.energy_ratio for one in alone]).reshape(2, 2)
    torch.testing.assert_close(result.energy_ratio, ratios, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", ((400, 5), (5, 400)), ids=str)
def test_only_the_small_gram_matrix(shape, largest_tensor):
    weight = randn(*shape)
    with largest_tensor:
        principal_directions(weight)
    assert largest_tensor.elements == weight.numel()


def test_strides_scale_and_gradient():
    weight = randn(12, 9)
    expected = projector(principal_directions(weight).basis)
    scaled = (weight * 10.0 ** torch.arange(-3, 9)[:, None]).T.contiguous().T.requires_grad_()
    result = principal_directions(scaled)
    torch.testing.assert_close(projector(result.basis), expected, rtol=0, atol=1e-4)
    assert not result.basis.requires_grad
    huge = principal_directions((1e30 * weight).float())
    torch.testing.assert_close(projector(huge.basis), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ((12, 30), (30, 12)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("length", (1e-20, 1e-9, 1e-7, 1e25), ids=str)
def test_rows_of_any_length(length, dtype, shape):
    weight = length * randn(*shape) * 10.0 ** torch.arange(shape[0])[:, None].clamp(max=4)
    unit = oracle.unit_rows(weight.to(dtype).double())
    values, vectors = torch.linalg.eigh(unit.mT @ unit / shape[0])
    result = principal_directions(weight.to(dtype), rank=2)
    assert int(result.rank) == 2
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(result.eigenvalues[:2].double() / values[-1], values[-2:].flip(0) / values[-1], **close)
    torch.testing.assert_close(projector(result.basis), projector(vectors[:, -2:]), **close)


@pytest.mark.parametrize("shape", ((12, 30), (30, 12)), ids=str)
def test_a_backend_brings_its_own_products(shape):
    weight, seen = randn(*shape).float(), []

    def gram(rows):
        seen.append(("gram", *rows.shape))
        return (rows.double() @ rows.double().mT).float()

    def matmul(left, right):
        seen.append(("matmul", *left.shape, right.shape[1]))
        return left @ right

    products = dataclasses.replace(TORCH, gram=gram, matmul=matmul)
    result = leading_directions(products, weight, 0.5, None, "auto", None, None)
    expected = principal_directions(weight, impl="reference")
    torch.testing.assert_close(projector(result.basis), projector(expected.basis), rtol=0, atol=1e-5)
    assert seen == [("gram", 12, 30), ("matmul", 30, 12, int(result.rank))][: 2 if shape == (12, 30) else 1]


def test_zero_rows_do_not_count_as_directions():
    weight = torch.cat([randn(4, 9), torch.zeros(3, 9, dtype=torch.float64)])
    assert int(principal_directions(weight, 1.0).rank) == 4


def test_rank_rule_is_pure():
    values, total = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([10.0], dtype=torch.float64)
    floor = torch.tensor([1.5])
    assert spectrum.choose_rank(values, total, floor, 0.69, None).tolist() == [2]
    assert spectrum.choose_rank(values, total, floor, 0.95, None).tolist() == [3]
    assert spectrum.choose_rank(values, total, floor, 0.0, 2).tolist() == [2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"energy_ratio": 1.5}, ValueError, "energy_ratio must be between 0 and 1, got 1.5"),
        ({"energy_ratio": -0.1}, ValueError, "energy_ratio must be between 0 and 1"),
        ({"energy_ratio": float("nan")}, ValueError, "energy_ratio must be between 0 and 1, got nan"),
        ({"rank": 4}, ValueError, "rank must be between 0 and 3, got 4"),
        ({"rank": -1}, ValueError, "rank must be between 0 and 3, got -1"),
        ({"rank": 1.0}, TypeError, "rank must be an integer, got float"),
        ({"method": "lanczos"}, ValueError, "method must be one of auto, eigh, svd, subspace, tracked, got 'lanczos'"),
        ({"weight": torch.zeros(3, 5)}, ValueError, "weight must have a non-zero row, got a zero matrix"),
        ({"weight": torch.stack([torch.ones(3, 5), torch.zeros(3, 5)])}, ValueError, r"matrices \[\[1\]\]"),
        ({"weight": torch.full((3, 5), 1e-30)}, ValueError, "weight must have a non-zero row, got a zero matrix"),
        ({"weight": torch.eye(5) * float("inf")}, ValueError, "weight must be finite"),
        ({"weight": torch.full((3, 5), float("nan"))}, ValueError, "weight must be finite"),
        ({"weight": torch.full((3, 5), float("inf"))}, ValueError, "weight must be finite"),
        ({"weight": torch.full((3, 5), 1e200, dtype=torch.float64)}, ValueError, "rows of norm below 1.3e154"),
        ({"weight": torch.zeros(0, 5)}, ValueError, r"at least one element, got shape \[0, 5\]"),
        ({"weight": torch.zeros(5)}, ValueError, "weight must have at least 2 dimensions"),
        ({"impl": "gpu"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        principal_directions(**({"weight": torch.ones(3, 5)} | options))
