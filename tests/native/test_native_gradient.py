"""Gradients of the energy by the native kernels of every instruction set, against autograd of the fp64 oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from calls import DIMS, ROWS, budget, expected_energy, expected_rows, gradient, layouts
from cases import DTYPES, EXPONENTS, VARIANTS, crowded, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphere_kernels import hyperspherical_energy

WIDE = (torch.float64, torch.float32)


def assert_within_budget(n, d, dtype, *options):
    _, _, expected, plain = expected_energy(n, d, dtype, *options)
    actual = gradient(randn(n, d, dtype=dtype), randn(n, seed=1), *options)
    error, allowed = (actual.double() - expected).abs().max(), budget(plain, expected, dtype)
    print(f"n {n} d {d} error {error:.2e} budget {allowed:.2e}")
    assert actual.dtype == dtype
    assert error <= allowed
    relative = 2e-6 if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
    assert error <= relative * expected.abs().max()


def assert_rows_close(actual, expected, tolerance, message=""):
    """Row by row, relative to the row: a coincident pair's gradient is many orders above the others'."""
    error = (actual.double() - expected.double()).norm(dim=-1)
    allowed = tolerance * (expected.double().norm(dim=-1) + 1e-3)
    assert (error <= allowed).all(), (message, (error / allowed).max())


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
@pytest.mark.parametrize("n", ROWS[1:])
def test_rows(tier, dtype, n):
    for s, distance, half_space in ((1.0, "euclidean", False), (2.0, "euclidean", False), (1.0, "angular", True)):
        assert_within_budget(n, 17, dtype, s, distance, half_space)


# Groups of 1536 rows (1152 in fp64), and of 20 MB, which are cut along the depth.
@pytest.mark.parametrize(("n", "d"), [(1153, 70), (1537, 70), (3100, 20), (400, 14000), (100, 60000)])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_groups(tier, dtype, n, d):
    several = ((1.0, "euclidean", False), (2.0, "euclidean", True), (0.0, "angular", False))
    for options in several if d < 100 else several[:1]:
        weight, upstream, rows, _, expected = expected_rows(n, d, dtype, *options)
        actual = gradient(weight, upstream, *options)
        assert actual.isfinite().all()
        tolerance = 1e-11 if dtype == torch.float64 else 2e-6
        assert (actual[rows] - expected).abs().max() <= tolerance * expected.abs().max()


def test_coincident_rows_across_groups(tier):
    pairs = [(0, 1599), (5, 6), (95, 96), (191, 192), (800, 1550), (1535, 1536)]
    weight, upstream = randn(1600, 30), randn(1600, seed=1)
    for i, j in pairs:
        weight[j] = torch.nn.functional.normalize(weight[i], dim=0) + 1e-4 * weight[j]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        actual = gradient(weight.to(dtype), upstream, 3.0)
        for pair in pairs:  # it alone pulls 1e8 times as much as the rest
            expected = oracle.gradient(weight[list(pair)].to(dtype), upstream[list(pair)], 3.0)
            assert_rows_close(actual[list(pair)], expected, tolerance, pair)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_coincident_rows(tier, dtype, s, distance, half_space):
    weight, upstream = crowded().to(dtype), randn(24, seed=2)
    expected = oracle.gradient(weight, upstream, s, distance, half_space)
    # As the reference's, where the oracle's own rounding decides (tests/kernels/test_energy_gradient.py).
    tolerance = 1e-5 if dtype == torch.float32 or distance == "angular" else 1e-11
    assert_rows_close(gradient(weight, upstream, s, distance, half_space), expected, tolerance)


def test_many_coincident_rows_in_fp32_lose_nothing_to_each_other(tier):
    # Each row has 199 near pairs; the reference adds them up in fp64 and errs by 6e-8.
    weight = (randn(1, 20) + 1e-3 * randn(200, 20, seed=3)).float()
    upstream = torch.ones(200)
    for options in ((1.0, "euclidean", False), (3.0, "euclidean", False), (1.0, "angular", False)):
        expected = oracle.gradient(weight, upstream, *options)
        assert_rows_close(gradient(weight, upstream, *options), expected, 2e-7)


def test_tiny_upstream_of_huge_energies(tier):
    # The gradient of log E: upstream 1 / E is far below the smallest fp32, the slopes are as far above 1.
    weight = torch.nn.functional.normalize(randn(64, 3), dim=-1).float()
    upstream = 1 / oracle.per_neuron(weight, 40.0).sum().expand(64)
    expected = oracle.gradient(weight, upstream, 40.0)
    assert upstream[0] < 1e-46 and expected.norm() > 1
    assert (gradient(weight, upstream, 40.0) - expected).norm() <= 1e-3 * expected.norm()


def test_exact_duplicates_are_clamped_and_do_not_pull(tier):
    for dtype in DTYPES:
        for n in (2, 5, 40):
            assert gradient(randn(1, 6, dtype=dtype).expand(n, 6), torch.ones(n)).abs().max() == 0


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_epsilon_of_the_normalisation_counts(tier, dtype):
    weight, upstream = (1e-8 * randn(40, 17)).to(dtype), randn(40, seed=2)
    for distance, half_space in VARIANTS:
        expected = oracle.gradient(weight, upstream, 1.0, distance, half_space)
        error = (gradient(weight, upstream, 1.0, distance, half_space).double() - expected).abs().max()
        assert error <= (1e-12 if dtype == torch.float64 else 2e-6) * expected.abs().max()


@pytest.mark.parametrize("scale", (1e20, 1e-20, 1e100, 1e-100))
def test_huge_and_tiny_rows(tier, scale):
    for dtype in WIDE:
        weight = randn(40, 17).mul_(torch.tensor([1.0, scale], dtype=torch.float64).repeat(20)[:, None]).to(dtype)
        for distance, half_space in VARIANTS:
            upstream = randn(40, seed=2)
            if weight.isinf().any():
                assert gradient(weight, upstream, 1.0, distance, half_space).isnan().all()
                continue
            expected = oracle.gradient(weight, upstream, 1.0, distance, half_space)
            plain, actual = (
                gradient(weight, upstream, 1.0, distance, half_space, impl=impl) for impl in ("reference", "native")
            )
            error, same = (actual - expected).norm(dim=-1), (plain - expected).norm(dim=-1)
            # In half space nearly all of a tiny row's gradient cancels, in the reference as here.
            assert (error <= 2 * same + 8 * torch.finfo(dtype).eps * expected.norm(dim=-1)).all()


def test_zero_rows_have_zero_gradient(tier):
    for dtype, (distance, half_space) in itertools.product(DTYPES, VARIANTS):
        weight = randn(40, 4, dtype=dtype)
        weight[[2, 39]] = 0
        actual = gradient(weight, torch.ones(40), 1.0, distance, half_space)
        assert actual[[2, 39]].abs().max() == 0
        assert actual[0].abs().min() > 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_gives_nan(tier, dtype, bad):
    for row, col in ((4, 2), (119, 8)):
        weight = crowded().to(dtype).repeat(2, 5, 1)
        weight[1, row, col] = bad
        for (distance, half_space), s in itertools.product(VARIANTS, (1.0, 3.0)):
            actual = gradient(weight, torch.ones(2, 120), s, distance, half_space)
            assert actual[0].isfinite().all() or dtype == torch.float16
            assert actual[1][weight[1].abs().sum(-1) != 0].isnan().all()
            assert actual[1][weight[1].abs().sum(-1) == 0].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(tier, dtype):
    weight, upstream = randn(3, 37, 19, dtype=dtype), randn(3, 37, seed=1)
    for distance, half_space in VARIANTS:
        expected = gradient(weight, upstream, 1.0, distance, half_space)
        for name, _, view in layouts(weight):
            actual = gradient(view, upstream, 1.0, distance, half_space)
            tolerance = 1e-12 if dtype == torch.float64 else 4 * max(torch.finfo(dtype).eps, 1e-6)
            assert_rows_close(actual, expected, tolerance, name)
            assert actual.is_contiguous()


def test_upstream_layouts(tier):
    weight, upstream = randn(3, 37, 19), randn(3, 37, seed=1)
    expected = gradient(weight, upstream)
    views = [view.squeeze(-1) for _, _, view in layouts(upstream.unsqueeze(-1))]
    for view in [*views, upstream.T.contiguous().T]:
        assert torch.equal(gradient(weight, view), expected)
    ones = gradient(weight, torch.ones(3, 37, dtype=torch.float64))
    assert torch.equal(gradient(weight, torch.ones((), dtype=torch.float32).expand(3, 37)), ones)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (1, 1), (3, 0), (0, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(tier, shape):
    for dtype, (distance, half_space) in itertools.product(DTYPES, VARIANTS):
        weight, upstream = randn(*shape, dtype=dtype), torch.ones(shape[:-1])
        expected = gradient(weight, upstream, 1.0, distance, half_space, impl="reference")
        # Only what a lone row's length lacks pulls against its own negative.
        torch.testing.assert_close(
            gradient(weight, upstream, 1.0, distance, half_space), expected, rtol=0.01, atol=1e-11
        )


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_gradcheck(tier, distance, half_space):
    for s in (0.0, 1.0, 2.0):
        assert torch.autograd.gradcheck(
            lambda w, s=s: hyperspherical_energy(
                w, s, reduction="none", distance=distance, half_space=half_space, impl="native"
            ),
            (randn(2, 8, 4).requires_grad_(),),
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 2), max_size=2),
    st.integers(0, 130),
    st.integers(2, 40),
    st.sampled_from(EXPONENTS),
    st.sampled_from(VARIANTS),
    st.sampled_from(WIDE),
)
def test_any_shape(tier, leading, n, d, s, variant, dtype):
    weight, upstream = randn(*leading, n, d, dtype=dtype), randn(*leading, n, seed=1)
    actual, expected = gradient(weight, upstream, s, *variant), oracle.gradient(weight, upstream, s, *variant)
    assert actual.shape == weight.shape
    # Pairs just outside the near ones cancel in fp32, and slopes have two powers of the distance more.
    reference = gradient(weight, upstream, s, *variant, impl="reference")
    error, same = ((found - expected).norm(dim=-1) for found in (actual, reference))
    tolerance = 1e-8 if dtype == torch.float64 else 3e-4
    most = 16 * same.max() if same.numel() else 0  # both are noise there, row by row another
    assert (error <= most + tolerance * (expected.norm(dim=-1) + 1e-3)).all()
