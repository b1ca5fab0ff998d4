"""Energies by the native kernels of every instruction set, against the fp64 oracle."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from calls import DIMS, ROWS, budget, energy, expected_energy, expected_rows, layouts
from cases import DTYPES, EXPONENTS, VARIANTS, crowded, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WIDE = (torch.float64, torch.float32)
# fp64 is limited by the oracle's own roundings; 16-bit weights go through fp32 arithmetic.
RELATIVE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def assert_within_budget(n, d, dtype, *options):
    expected, plain, _, _ = expected_energy(n, d, dtype, *options)
    actual = energy(randn(n, d, dtype=dtype), *options)
    error, allowed = (actual - expected).abs().max(), budget(plain, expected, dtype)
    print(f"n {n} d {d} error {error:.2e} budget {allowed:.2e}")
    assert actual.dtype == torch.float64
    assert error <= allowed
    assert error <= RELATIVE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(tier, dtype, s, distance, half_space):
    assert_within_budget(61, 33, dtype, s, distance, half_space)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("d", DIMS[2:])
def test_dimensions(tier, dtype, d):
    for n in (5, 50):
        assert_within_budget(n, d, dtype, 1.0, "euclidean", False)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("n", ROWS)
def test_rows(tier, dtype, n):
    for s, distance, half_space in ((1.0, "euclidean", False), (2.0, "euclidean", False), (1.0, "angular", True)):
        assert_within_budget(n, 17, dtype, s, distance, half_space)


@pytest.mark.parametrize("d", (1, 2, 3))
def test_few_dimensions_where_rows_coincide(tier, d):
    for (distance, half_space), s in itertools.product(VARIANTS, (0.0, 1.0, 2.0)):
        expected = oracle.per_neuron(randn(50, d), s, distance, half_space)
        actual = energy(randn(50, d), s, distance, half_space)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


# Groups of rows: more than 6144 of them, or more than 20 MB, which are cut along the depth.
@pytest.mark.parametrize(("n", "d"), [(6145, 3), (400, 14000), (100, 60000)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_groups(tier, dtype, n, d):
    several = ((1.0, "euclidean", False), (2.0, "euclidean", True))
    for options in several if d < 100 else several[:1]:
        weight, _, rows, expected, _ = expected_rows(n, d, dtype, *options)
        # Among many rows in three dimensions some are at 1e-3: fp32 loses 1e-4 of them, in the reference as here.
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5 if d == 3 else 1e-7
        torch.testing.assert_close(energy(weight, *options)[rows], expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("n", (1024, 1025, 1217))
def test_tiles_of_192_rows(tier, n):
    for dtype, (distance, half_space) in itertools.product(WIDE, VARIANTS):
        weight, _, rows, expected, _ = expected_rows(n, 70, dtype, 1.0, distance, half_space)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-7
        torch.testing.assert_close(energy(weight, 1.0, distance, half_space)[rows], expected, rtol=tolerance, atol=0)


@functools.cache
def unit_length_energy(weight):
    square = 2 - 2 * (weight.double() @ weight.double().T).fill_diagonal_(0)
    return square.rsqrt().fill_diagonal_(0).sum().item()


ORTHOGONAL = torch.linalg.qr(randn(600, 600)).Q
RANDOM = torch.nn.functional.normalize(randn(576, 1536), dim=-1)


@pytest.mark.parametrize("weight", (ORTHOGONAL, RANDOM, torch.eye(600)), ids=("orthogonal", "random", "identity"))
def test_sum_in_fp32_is_not_biased(tier, weight):
    # Editing moves an energy of 1e7 by 10. Rounding of inner products averages out, and so must all that follows.
    # The reference errs by 4e-12, 7e-12 and 0; the weights are long, so that unit rows are of length 1.
    weight = 1e6 * weight.float()
    expected = unit_length_energy(torch.nn.functional.normalize(weight.double(), dim=-1))
    error = energy(weight).sum().item() / expected - 1
    print(f"relative error {error:.1e}")
    assert abs(error) < 1e-9


@pytest.mark.parametrize("length", (1.0, 0.3, 0.01))
def test_lack_of_length_in_fp32_is_not_rounded_away(tier, length):
    # 1 - |unit row|^2 = 2e-8 / length is the same for all pairs of a row: rounded to fp32 it is a bias of up to 3e-8.
    weight = length * RANDOM.float()
    expected = oracle_of_gram(length)
    assert abs(energy(weight).sum().item() / expected - 1) < 1e-9


@pytest.mark.parametrize(("s", "n", "d", "length"), ((1.0, 576, 64, 8.0), (2.0, 576, 64, 8.0), (1.0, 400, 16, 0.3)))
def test_mean_error_in_fp32_is_not_a_bias(tier, s, n, d, length):
    """Over eight draws the mean error stays within what their scatter explains."""
    errors = []
    for seed in range(8):
        weight = randn(n, d, seed=seed).float() * length / d**0.5
        errors.append(energy(weight, s).sum().item() / energy(weight.double(), s).sum().item() - 1)
    errors = torch.tensor(errors, dtype=torch.float64)
    assert abs(errors.mean()) < 5 * errors.std() / 8**0.5 + 1e-12


def test_values_far_below_that_of_a_right_angle_are_kept(tier):
    # 2^-110 each: beside 2^-55 it would be lost.
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert energy(weight, 110.0).tolist() == pytest.approx([2.0**-110] * 2, rel=1e-5)


@functools.cache
def oracle_of_gram(length):
    weight = (length * RANDOM.float()).double()
    return oracle.per_neuron_of_gram(weight @ weight.T).sum().item()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_coincident_rows(tier, dtype, s, distance, half_space):
    weight = crowded().to(dtype)
    expected = oracle.per_neuron(weight, s, distance, half_space)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]  # as the reference's, where it is explained
    torch.testing.assert_close(energy(weight, s, distance, half_space), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("t", (3.2e-2, 3.1e-2, 1e-2, 1e-4))
def test_near_duplicates_in_fp32(tier, t):
    weight = randn(300, 40, dtype=torch.float32)
    for i, j in ((0, 1), (5, 40), (95, 96), (3, 299), (17, 200)):
        weight[j] = torch.nn.functional.normalize(weight[i], dim=0) + t * torch.nn.functional.normalize(
            weight[j], dim=0
        )
    for s in (1.0, 3.0):
        expected = oracle.per_neuron(weight, s)
        torch.testing.assert_close(energy(weight, s), expected, rtol=5e-4 if t * t > 1e-3 else 1e-6, atol=0)
    two = torch.tensor([[1.0, 0.0], [1.0, t]], dtype=torch.float32)
    if t * t < 1e-3:  # recomputed from the difference
        torch.testing.assert_close(energy(two), oracle.per_neuron(two), rtol=1e-10, atol=0)


def test_exact_duplicates_take_the_clamp(tier):
    for s in EXPONENTS:
        each = oracle.riesz(torch.tensor(1e-6, dtype=torch.float64), s) * 36
        for dtype in DTYPES:
            torch.testing.assert_close(
                energy(randn(1, 6, dtype=dtype).expand(37, 6), s), each.expand(37), rtol=1e-9, atol=0
            )


def test_zero_rows_are_at_distance_one(tier):
    for dtype in DTYPES:
        weight = torch.cat([torch.zeros(2, 33), 1e4 * torch.eye(33)]).to(dtype)
        expected = oracle.per_neuron(weight, 3.0)
        torch.testing.assert_close(energy(weight, 3.0)[:2], expected[:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", (1e160, 1e30, 1e20, 1e-8, 1e-20, 1e-40, 1e-170))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_huge_and_tiny_rows(tier, dtype, scale):
    weight = randn(40, 33).mul_(torch.tensor([1.0, scale], dtype=torch.float64).repeat(20)[:, None]).to(dtype)
    for distance, half_space in VARIANTS:
        actual, expected = (
            energy(weight, 1.0, distance, half_space),
            oracle.per_neuron(weight, 1.0, distance, half_space),
        )
        if scale > 1e150 or weight.isinf().any():
            assert actual.isnan().all()
        else:
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_gives_nan(tier, dtype, bad):
    weight = crowded().to(dtype).repeat(2, 5, 1)
    clean = energy(weight)
    for row, col in ((4, 2), (119, 8)):
        spoilt = weight.clone()
        spoilt[1, row, col] = bad
        for (distance, half_space), s in itertools.product(VARIANTS, (0.0, 1.0, 2.0)):
            assert energy(spoilt, s, distance, half_space)[1].isnan().all()
            assert energy(spoilt[1, row : row + 1], s, distance, half_space).isnan().all()
        assert torch.equal(energy(spoilt)[0], clean[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(tier, dtype):
    weight = randn(3, 37, 19, dtype=dtype)
    for (distance, half_space), s in itertools.product(VARIANTS, (1.0, 3.0)):
        expected = energy(weight, s, distance, half_space)
        for name, _, view in layouts(weight):
            actual = energy(view, s, distance, half_space)
            torch.testing.assert_close(
                actual, expected, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0, msg=name
            )
            assert actual.is_contiguous()


def test_broadcast_and_leading_dimensions(tier):
    weight = randn(40, 17, dtype=torch.float32)
    expected = energy(weight)
    for view in (weight.expand(5, 40, 17), weight.expand(2, 3, 40, 17)):
        assert torch.equal(energy(view), expected.expand(view.shape[:-1]))
    row, column = randn(1, 17, dtype=torch.float32), randn(40, 1, dtype=torch.float32)
    for view in (row.expand(40, 17), column.expand(40, 17)):
        torch.testing.assert_close(energy(view), oracle.per_neuron(view), rtol=1e-6, atol=0)
    apart = randn(4, 3, 40, 17).transpose(0, 1)
    torch.testing.assert_close(energy(apart)[2, 1], oracle.per_neuron(apart[2, 1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (1, 1), (3, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(tier, shape):
    for dtype, (distance, half_space) in itertools.product(DTYPES, VARIANTS):
        weight = randn(*shape, dtype=dtype)
        actual = energy(weight, 1.0, distance, half_space)
        expected = energy(weight, 1.0, distance, half_space, impl="reference")
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 130),
    st.integers(1, 40),
    st.sampled_from(EXPONENTS),
    st.sampled_from(VARIANTS),
    st.sampled_from(WIDE),
    st.integers(0, 99),
)
def test_any_shape(tier, leading, n, d, s, variant, dtype, seed):
    weight = randn(*leading, n, d, dtype=dtype, seed=seed)
    actual, expected = energy(weight, s, *variant), oracle.per_neuron(weight, s, *variant)
    assert actual.shape == weight.shape[:-1]
    # fp32 pairs just outside the near ones cancel: 1e-7 / 1e-3 of them.
    tolerance = 1e-8 if dtype == torch.float64 else 3e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
