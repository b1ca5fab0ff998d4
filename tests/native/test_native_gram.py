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

from sphere_kernels import gram, gram_energy, gram_update_energy_
from sphere_kernels._backends import native
from sphere_kernels._products import products_for

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


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("n", (1, 47, 97, 300, 1100))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_energy_alone_has_the_bits_of_an_update_of_rank_0(tier, dtype, n, distance, half_space):
    weight = randn(n, 12, dtype=dtype)
    weight[n // 2] = weight[0] * 2  # a near pair, but for the lone row
    matrix, nothing = native_gram(weight), torch.zeros(n, 0, dtype=dtype)
    for rows, s in itertools.product((None, weight), (1.0, 1.5)):
        options = {"weight": rows, "distance": distance, "half_space": half_space}
        energies = gram_energy(matrix, s, impl="native", **options)
        assert torch.equal(energies, native_update_(matrix.clone(), nothing, nothing, nothing[:0], s, **options))


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


def factored(n, b, dtype, leading=(), seed=0):
    """An exactly symmetric matrix, a factor, and what is left of the one without the other's products, in fp64."""
    start = randn(*leading, n, n, dtype=dtype, seed=seed)
    start, factor = start + start.mT, randn(*leading, n, b, dtype=dtype, seed=seed + 1)
    return start, factor, start.double() - factor.double() @ factor.double().mT


def assert_subtracted(actual, start, factor, expected):
    allowed = budget(start - factor @ factor.mT, expected, start.dtype)
    if start.dtype == torch.float64:  # the oracle is plain torch then, and the sums have another order
        allowed = 4 * allowed + torch.finfo(torch.float64).eps * factor.square().sum(-1).amax() * 4
    error = (actual.double() - expected).abs().max()
    assert error <= allowed, f"{list(factor.shape)} error {error:.2e} budget {allowed:.2e}"
    assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_subtract_sizes(tier, dtype):
    for n, b in [*((n, 5) for n in ROWS), *((50, b) for b in DIMS), (97, 100), (193, 257)]:
        start, factor, expected = factored(n, b, dtype)
        actual = start.clone()
        native.subtract_gram_(actual, factor)
        assert_subtracted(actual, start, factor, expected)


# Tiles of 192 from 1025 rows on; rows too long for a group, in whole and in parts.
@pytest.mark.parametrize(("n", "b"), [(1024, 3), (1025, 3), (1153, 7), (400, 14000), (97, 60000)])
def test_subtract_groups(tier, n, b):
    start, factor, expected = factored(n, b, torch.float32)
    actual = start.clone()
    native.subtract_gram_(actual, factor)
    assert_subtracted(actual, start, factor, expected)


def test_subtract_groups_of_many_rows(tier):
    n = 6145  # past the most rows of a group
    line, factor = randn(n, dtype=torch.float32), randn(n, 2, dtype=torch.float32, seed=1)
    actual = line + line[:, None]
    native.subtract_gram_(actual, factor)
    rows = torch.tensor([0, 1, 95, 96, 191, 192, 3071, 3072, 3073, 3264, 6142, 6143, 6144])
    expected = line.double() + line[rows, None] - factor[rows].double() @ factor.double().mT
    assert (actual[rows] - expected).abs().max() <= 4e-7 * expected.abs().max()
    assert torch.equal(actual[:, rows].mT, actual[rows])
    assert (actual.double().sum() - 2 * n * line.double().sum() + factor.double().sum(0).square().sum()).abs() <= 1


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_subtract_in_any_memory(tier, dtype):
    for n in (37, 100):
        start, factor, _ = factored(n, 19, dtype, (3,))
        expected = start.clone()
        native.subtract_gram_(expected, factor)
        for name, storage, view in layouts(start):
            native.subtract_gram_(view, factor)
            assert torch.equal(view, expected), name
            view.fill_(float("nan"))
            assert storage.isnan().all(), f"{name}: written outside"
        for name, _, view in [*layouts(factor), ("by columns", None, factor.mT.contiguous().mT)]:
            actual = start.clone()
            native.subtract_gram_(actual, view)
            assert torch.equal(actual, expected), name
            assert torch.equal(view, factor), name


def test_subtract_where_leading_dimensions_do_not_merge(tier):
    start, factor, expected = factored(10, 4, torch.float64, (2, 3))
    for gaps in ((1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 1, 3)):
        storage, view = around(start.transpose(0, 1), *gaps)
        view = view.transpose(0, 1)
        view.copy_(start)
        native.subtract_gram_(view, factor.transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-13)
        view.fill_(float("nan"))
        assert storage.isnan().all()
    shared = factor[0, 0].expand(2, 3, 10, 4)
    actual = start.clone()
    native.subtract_gram_(actual, shared)
    torch.testing.assert_close(actual, start - factor[0, 0] @ factor[0, 0].mT, rtol=0, atol=1e-13)


def test_subtract_reads_only_the_upper_triangle(tier):
    for n in (20, 200):
        start, factor, _ = factored(n, 3, torch.float32, (2,))
        spoilt = torch.where(torch.ones(n, n, dtype=torch.bool).tril(-1), float("nan"), start)
        native.subtract_gram_(start, factor)
        native.subtract_gram_(spoilt, factor)
        assert torch.equal(spoilt, start)


@pytest.mark.parametrize(("leading", "n", "b"), [((), 61, 30), ((), 300, 100), ((), 1100, 20), ((5,), 70, 40)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_subtract_threads_change_no_bit(tier, dtype, leading, n, b, with_threads):
    start, factor, _ = factored(n, b, dtype, leading)
    results = []
    for threads in (1, 2, 3, 1):
        actual = start.clone()
        with_threads(threads, native.subtract_gram_, actual, factor)
        results.append(actual)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_subtract_what_is_not_finite(tier, dtype, bad):
    for n in (30, 130):
        start, factor, _ = factored(n, 3, dtype)
        factor[n - 2, 1] = bad
        start[3, 5] = start[5, 3] = bad
        expected = start - factor @ factor.mT
        native.subtract_gram_(start, factor)
        assert torch.equal(start.isnan(), expected.isnan())
        assert torch.equal(start.isinf(), expected.isinf())


@pytest.mark.parametrize(("leading", "n", "b"), [((), 0, 3), ((), 0, 0), ((), 5, 0), ((0,), 4, 2), ((2, 0), 4, 2)])
def test_subtract_nothing(tier, leading, n, b):
    for dtype in WIDE:
        start, factor, _ = factored(n, b, dtype, leading)
        actual = start.clone()
        native.subtract_gram_(actual, factor)
        assert torch.equal(actual, start)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 130),
    st.integers(0, 40),
    st.sampled_from(WIDE),
    st.booleans(),
    st.booleans(),
)
def test_any_subtraction(tier, leading, n, b, dtype, turned, by_columns):
    start, factor, expected = factored(n, b, dtype, tuple(leading))
    actual = start.clone().mT if by_columns else start.clone()
    native.subtract_gram_(actual, factor.mT.contiguous().mT if turned else factor)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=400 * torch.finfo(dtype).eps)
    assert torch.equal(actual, actual.mT)


IN_MEMORY = {
    "contiguous": lambda tensor: tensor.clone(),
    "by columns": lambda tensor: tensor.mT.clone(memory_format=torch.contiguous_format).mT,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1).repeat_interleave(3, -2)[..., ::3, ::2],
    "leading dimensions that do not merge": lambda tensor: tensor.transpose(0, -3).contiguous().transpose(0, -3),
    "negative bit": lambda tensor: torch._neg_view(-tensor),
}


PRODUCTS = [((), 50, 7, 130), ((), 1, 1, 1), ((), 97, 200, 33), ((3,), 20, 5, 17), ((2, 3), 9, 4, 12), ((), 6, 0, 8)]


def assert_products(impl, leading, n, b, d, dtype, memory):
    layout = IN_MEMORY[memory]
    written = layout if memory != "negative bit" else torch.clone
    left, right = (layout(randn(*leading, *shape, dtype=dtype, seed=k)) for k, shape in enumerate(((n, b), (b, d))))
    start, symmetric = randn(*leading, n, d, dtype=dtype, seed=5), randn(*leading, n, n, dtype=dtype, seed=6)
    symmetric = symmetric + symmetric.mT
    added, subtracted = written(start), written(symmetric)
    products = products_for(start, impl)
    products.add_(added, left, right)
    products.subtract_gram_(subtracted, left)
    own, product = left.double() @ left.double().mT, left.double() @ right.double()
    allowed = max(1, b) ** 0.5 * 16 * torch.finfo(dtype).eps
    found = {
        "gram": (products.gram(left), own),
        "matmul": (products.matmul(left, right), product),
        "add_": (added, start.double() + product),
        "subtract_gram_": (subtracted, symmetric.double() - own),
    }
    for name, (value, exact) in found.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact, rtol=allowed, atol=allowed, msg=f"{name}, {memory}")
    assert torch.equal(subtracted, subtracted.mT), "not symmetric"
    assert found["gram"][0].is_contiguous()
    assert found["matmul"][0].is_contiguous()


def memories(leading):
    return [name for name in IN_MEMORY if len(leading) > 1 or "merge" not in name]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("leading", "n", "b", "d"), PRODUCTS)
def test_products(tier, leading, n, b, d, dtype):
    for memory in memories(leading):
        assert_products("native", leading, n, b, d, dtype, memory)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("leading", "n", "b", "d"), PRODUCTS)
def test_products_of_the_reference(leading, n, b, d, dtype):
    for memory in memories(leading):
        assert_products("reference", leading, n, b, d, dtype, memory)
