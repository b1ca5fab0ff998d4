"""Gram matrices and their updates by the native kernels of every instruction set, in fp64 terms."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from calls import DIMS, ROWS, around, budget, layouts, updated
from cases import DTYPES, EXPONENTS, VARIANTS, crowded, randn, update_inputs, update_to_crowded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphere_kernels import gram, gram_update_energy_

WIDE = (torch.float64, torch.float32)
native_gram = functools.partial(gram, impl="native")
native_update_ = functools.partial(gram_update_energy_, impl="native")


def in_fp64(weight, normalize):
    rows = oracle.unit_rows(weight.double()) if normalize else weight.double()
    return rows @ rows.mT


def in_plain_torch(weight, normalize):
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = weight / (weight.norm(dim=-1, keepdim=True) + 1e-8) if normalize else weight
    return rows @ rows.mT


def assert_gram(weight, normalize):
    expected, plain = in_fp64(weight, normalize), in_plain_torch(weight, normalize)
    actual = native_gram(weight, normalize=normalize)
    assert actual.dtype == plain.dtype
    assert actual.is_contiguous()
    assert torch.equal(actual, actual.mT)
    error, allowed = (actual - expected).abs().max(), budget(plain, expected, plain.dtype)
    if plain.dtype == torch.float64:  # the oracle is plain torch then, and the sums have another order
        allowed *= 4
    print(f"{list(weight.shape)} error {error:.2e} budget {allowed:.2e}")
    assert error <= allowed


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_sizes(tier, dtype, normalize):
    for n, d in [*((50, d) for d in DIMS), *((n, 17) for n in ROWS)]:
        assert_gram(randn(n, d, dtype=dtype), normalize)


# Tiles of 192; groups of rows, 20 MB of them, in tiles of 96 and of 48.
@pytest.mark.parametrize(("n", "d"), [(1025, 20), (1217, 20), (400, 14000), (100, 60000)])
def test_gram_groups(tier, n, d):
    for normalize in (False, True):
        assert_gram(randn(n, d, dtype=torch.float32), normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_layouts(tier, dtype):
    weight = randn(3, 37, 19, dtype=dtype)
    for normalize, (name, _, view) in itertools.product((False, True), layouts(weight)):
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        expected = native_gram(weight, normalize=normalize)
        torch.testing.assert_close(
            native_gram(view, normalize=normalize), expected, rtol=tolerance, atol=tolerance, msg=name
        )
    shared = weight[0].expand(2, 3, 37, 19)
    assert torch.equal(native_gram(shared)[1, 2], native_gram(weight)[0])


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_of_what_is_not_finite(tier, dtype, bad):
    weight = crowded().to(dtype).repeat(5, 1)
    weight[4, 2] = bad
    for normalize in (False, True):
        actual, expected = native_gram(weight, normalize=normalize), gram(weight, normalize=normalize, impl="reference")
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_gram_empty(tier, shape):
    for dtype, normalize in itertools.product(DTYPES, (False, True)):
        weight = randn(*shape, dtype=dtype)
        expected = gram(weight, normalize=normalize, impl="reference")
        torch.testing.assert_close(native_gram(weight, normalize=normalize), expected)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_update_within_budget(tier, dtype, s, distance, half_space):
    (matrix, *factors), weight = update_inputs(randn(61, 33), 5, dtype)
    expected, eps = updated(matrix, *factors), torch.finfo(dtype).eps
    left, cross, inner = factors
    plain = matrix + cross @ left.mT + left @ cross.mT + left @ inner @ left.mT
    energies = native_update_(matrix, *factors, s, distance=distance, half_space=half_space)
    assert (matrix - expected).abs().max() <= budget(plain, expected, dtype)
    assert torch.equal(matrix, matrix.mT)
    options = (s, distance, half_space)
    torch.testing.assert_close(energies, oracle.per_neuron(weight, *options), rtol=100 * eps, atol=100 * eps)
    again, _ = update_inputs(randn(61, 33), 5, dtype)
    with_weight = native_update_(*again, s, weight=weight.to(dtype), distance=distance, half_space=half_space)
    torch.testing.assert_close(with_weight, energies, rtol=100 * eps, atol=100 * eps)
    assert torch.equal(again[0], matrix)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_update_energy_is_that_of_the_matrix(tier, dtype):
    # In fp64 from the written matrix on, but for the rounding of inner products in fp32, as the docstring has it.
    tolerance = 1e-8 if dtype == torch.float32 else 1e-12
    for s in (1.0, 2.0, 3.0):
        (matrix, *factors), _ = update_inputs(randn(61, 33), 5, dtype)
        energies = native_update_(matrix, *factors, s)
        torch.testing.assert_close(energies, oracle.per_neuron_of_gram(matrix, s), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_update_sizes(tier, dtype):
    for n, b in [*((n, 3) for n in ROWS), *((50, b) for b in (0, 1, 2, 7, 8, 9, 33, 130))]:
        (matrix, *factors), weight = update_inputs(randn(2, n, 40), b, dtype)
        expected, eps = updated(matrix, *factors), torch.finfo(dtype).eps
        energies = native_update_(matrix, *factors)
        assert (matrix - expected).abs().max() <= 8 * eps * expected.abs().max(), (n, b)
        assert torch.equal(matrix, matrix.mT)
        torch.testing.assert_close(energies, oracle.per_neuron(weight), rtol=300 * eps, atol=300 * eps)


def test_update_groups(tier):
    (matrix, *factors), weight = update_inputs(randn(450, 500), 1500, torch.float64)  # 450 * 3000 * 8 bytes, twice
    expected = updated(matrix, *factors)
    energies = native_update_(matrix, *factors)
    assert (matrix - expected).abs().max() <= 1e-12 * expected.abs().max()
    square = oracle.per_neuron_of_gram(weight @ weight.mT)
    torch.testing.assert_close(energies, square, rtol=1e-11, atol=0)


def test_only_the_upper_triangle_is_read(tier):
    for n in (20, 200):
        (matrix, *factors), _ = update_inputs(randn(2, n, 9), 3, torch.float64)
        spoilt = torch.where(torch.ones(n, n, dtype=torch.bool).tril(-1), float("nan"), matrix)
        energies = native_update_(matrix, *factors)
        assert torch.equal(native_update_(spoilt, *factors), energies)
        assert torch.equal(spoilt, matrix)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_update_in_any_memory(tier, dtype):
    (start, *factors), weight = update_inputs(randn(3, 37, 19), 3, dtype)
    expected = start.clone()
    energies = native_update_(expected, *factors)
    for name, storage, view in layouts(start):
        if name == "negative bit":
            continue  # torch itself stops an operation that writes into one and returns something else
        actual = native_update_(view, *factors)
        assert torch.equal(actual, energies), name
        assert torch.equal(view, expected), name
        view.fill_(float("nan"))
        assert storage.isnan().all(), f"{name}: written outside"
    for views in zip(*([view for _, _, view in layouts(factor)] for factor in factors), strict=True):
        matrix = start.clone()
        assert torch.equal(native_update_(matrix, *views), energies)
        assert torch.equal(matrix, expected)
    exact = native_update_(start.clone(), *factors, weight=weight)
    for name, _, view in layouts(weight):
        torch.testing.assert_close(
            native_update_(start.clone(), *factors, weight=view), exact, rtol=1e-10, atol=0, msg=name
        )


def test_update_where_leading_dimensions_do_not_merge(tier):
    (start, *factors), _ = update_inputs(randn(2, 3, 10, 12), 3, torch.float64)
    expected, energies = updated(start, *factors), None
    for gaps in ((1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 1, 3)):
        storage, view = around(start.transpose(0, 1), *gaps)
        view = view.transpose(0, 1)
        view.copy_(start)
        actual = native_update_(view, *factors)
        torch.testing.assert_close(view, expected)
        torch.testing.assert_close(actual, oracle.per_neuron_of_gram(expected))
        assert energies is None or torch.equal(actual, energies)
        energies = actual
        view.fill_(float("nan"))
        assert storage.isnan().all()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_coincident_rows_come_from_the_weight(tier, dtype, distance, half_space):
    for s in (0.0, 1.0, 3.0):
        before, factors, after = update_to_crowded(dtype)
        matrix = native_gram(before).to(dtype)
        energies = native_update_(matrix, *factors, s, weight=after.to(dtype), distance=distance, half_space=half_space)
        tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype]  # as the reference's
        expected = oracle.per_neuron(after, s, distance, half_space)
        torch.testing.assert_close(energies, expected, rtol=tolerance, atol=tolerance)


def test_weight_of_any_dtype(tier):
    for dtype in DTYPES:
        weight = randn(40, 6, dtype=dtype)
        weight[4] = weight[3] * (1 + 0.01 * randn(6, seed=2)).to(dtype)
        matrix = native_gram(weight)
        nothing = torch.zeros(40, 0, dtype=matrix.dtype)
        energies = native_update_(matrix, nothing, nothing, nothing[:0], weight=weight)
        torch.testing.assert_close(energies, oracle.per_neuron(weight), rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_update_of_what_is_not_finite(tier, dtype, bad):
    for (distance, half_space), s in itertools.product(VARIANTS, (0.0, 1.0, 2.0)):
        options = {"distance": distance, "half_space": half_space}
        for i, j in ((3, 115), (4, 5), (6, 6), (119, 119)):
            results = []
            for impl in ("reference", "native"):
                (matrix, *factors), weight = update_inputs(randn(2, 120, 9), 2, dtype)
                matrix[1, i, j] = matrix[1, j, i] = bad
                energies = gram_update_energy_(matrix, *factors, s, weight=weight, impl=impl, **options)
                results.append((energies.isnan(), matrix.isnan(), matrix.isinf()))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), (i, j)
            assert results[1][0].any()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_special_diagonals(tier, distance, half_space):
    matrix = torch.eye(40) + 0.1
    matrix[3, 3] = -1e-9  # a zero row but for rounding
    matrix[:3, 3] = matrix[3, :3] = 1e-7
    matrix[5, 6] = matrix[6, 5] = 1.1 * (1 + 1e-6)  # an inner product above one
    matrix[7], matrix[:, 7] = 0, 0
    nothing = torch.zeros(40, 0)
    options = {"distance": distance, "half_space": half_space}
    expected = gram_update_energy_(matrix.clone(), nothing, nothing, nothing[:0], impl="reference", **options)
    actual = native_update_(matrix, nothing, nothing, nothing[:0], **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "b"), [(0, 0), (0, 3), (1, 0), (1, 2), (5, 0)])
def test_update_empty(tier, n, b):
    for leading, dtype in itertools.product(((), (0,), (2,), (0, 3)), WIDE):
        (matrix, *factors), weight = update_inputs(randn(*leading, n, 4), b, dtype)
        expected = updated(matrix, *factors)
        energies = native_update_(matrix, *factors, weight=weight)
        assert energies.shape == (*leading, n)
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 130),
    st.integers(0, 9),
    st.sampled_from(VARIANTS),
    st.sampled_from(WIDE),
    st.booleans(),
)
def test_any_update(tier, leading, n, b, variant, dtype, with_weight):
    (matrix, *factors), weight = update_inputs(randn(*leading, n, 12), b, dtype)
    expected, eps = updated(matrix, *factors), torch.finfo(dtype).eps
    options = {"distance": variant[0], "half_space": variant[1], "weight": weight if with_weight else None}
    energies = native_update_(matrix, *factors, 1.0, **options)
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=1000 * eps)
    torch.testing.assert_close(energies, oracle.per_neuron(weight, 1.0, *variant), rtol=3000 * eps, atol=3000 * eps)
