"""Gradients of the energy, against autograd of the fp64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import DTYPES, EXPONENTS, VARIANTS, crowded, randn

from sphere_kernels import hyperspherical_energy

pytestmark = pytest.mark.usefixtures("each_impl")


def gradient(weight, upstream, s=1.0, distance="euclidean", half_space=False):
    leaf = weight.detach().requires_grad_()
    energy = hyperspherical_energy(leaf, s, reduction="none", distance=distance, half_space=half_space)
    (energy * upstream).sum().backward()
    return leaf.grad


def upstream_of(weight):
    return randn(*weight.shape[:-1], seed=2)


def assert_rows_close(actual, expected, tolerance):
    """Row by row, relative to the row: a coincident pair's gradient is many orders above the others'."""
    error = (actual.double() - expected).norm(dim=-1)
    allowed = tolerance * (expected.norm(dim=-1) + 1e-3)
    assert (error <= allowed).all(), (error / allowed).tolist()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
def test_gradcheck(s, distance, half_space, small_tiles):
    weight = randn(2, 8, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: hyperspherical_energy(w, s, reduction="none", distance=distance, half_space=half_space), (weight,)
    )


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_gradcheck_of_reductions(reduction):
    weight = randn(3, 5, 4).requires_grad_()
    for half_space in (False, True):
        assert torch.autograd.gradcheck(
            lambda w, h=half_space: hyperspherical_energy(w, reduction=reduction, half_space=h), (weight,)
        )


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", (0.0, 1.0, 3.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, s, distance, half_space, small_tiles):
    weight = randn(29, 33, dtype=dtype)
    upstream = upstream_of(weight)
    expected = oracle.gradient(weight, upstream, s, distance, half_space)
    leaf = weight.clone().requires_grad_()
    (oracle.plain(leaf, s, distance, half_space) * upstream).sum().backward()
    actual = gradient(weight, upstream, s, distance, half_space)
    budget = 2 * ((leaf.grad.double() - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max())
    error = (actual.double() - expected).abs().max()
    print(f"error {error:.2e} budget {budget:.2e}")
    assert actual.dtype == dtype
    assert error <= budget
    assert error <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 64) * expected.abs().max()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_coincident_rows(dtype, s, distance, half_space, small_tiles):
    weight = crowded().to(dtype)
    upstream = upstream_of(weight)
    expected = oracle.gradient(weight, upstream, s, distance, half_space)
    # Unit rows round to 1e-16. At t = 1e-4 and above that costs 1e-12; but the epsilon in the normalisation puts exact
    # duplicates at an angle of 2e-4, with no direction but rounding: 1e-16 times slopes of 1e11 in rows of norm 10.
    # Native, which multiplies by the reciprocal of the length, rounds otherwise than the oracle (measured 4e-6).
    tolerance = 1e-5 if dtype == torch.float32 or distance == "angular" else 1e-11
    assert_rows_close(gradient(weight, upstream, s, distance, half_space), expected, tolerance)


def test_coincident_rows_across_real_tiles():
    weight = randn(300, 16, dtype=torch.float32)
    weight[280] = weight[3] + 1e-4 * weight[4]
    weight[290] = -weight[5] + 1e-4 * weight[6]
    upstream = upstream_of(weight)
    for distance, half_space in VARIANTS:
        expected = oracle.gradient(weight, upstream, 1.0, distance, half_space)
        assert_rows_close(gradient(weight, upstream, 1.0, distance, half_space), expected, 1e-5)


def test_exact_duplicates_are_clamped_and_do_not_pull():
    weight = randn(1, 6).repeat(2, 1)
    assert gradient(weight, torch.ones(2)).abs().max() == 0


def test_epsilon_of_the_normalisation_counts():
    weight = 1e-8 * randn(6, 4)
    upstream = upstream_of(weight)
    for distance, half_space in VARIANTS:
        expected = oracle.gradient(weight, upstream, 1.0, distance, half_space)
        actual = gradient(weight, upstream, 1.0, distance, half_space)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_zero_row_has_zero_gradient():
    weight = randn(5, 4)
    weight[2] = 0
    for distance, half_space in VARIANTS:
        actual = gradient(weight, torch.ones(5), 1.0, distance, half_space)
        assert actual[2].abs().max() == 0
        assert actual[[0, 1, 3, 4]].abs().min() > 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_not_finite_gives_nan(bad, small_tiles):
    weight = crowded()
    weight[4, 2] = bad
    for distance, half_space in VARIANTS:
        actual = gradient(weight, torch.ones(24), 1.0, distance, half_space)
        assert actual[weight.abs().sum(-1) != 0].isnan().all()


def test_strided_weight_and_expanded_upstream(small_tiles):
    weight = randn(9, 16).T
    torch.testing.assert_close(gradient(weight, torch.ones(16)), oracle.gradient(weight, torch.ones(16)))
    assert gradient(randn(0, 3, 4), torch.ones(())).shape == (0, 3, 4)


def test_no_second_derivative():
    weight = randn(4, 3).requires_grad_()
    (first,) = torch.autograd.grad(hyperspherical_energy(weight), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        first.sum().backward()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_no_square_matrix_in_memory(distance, half_space, small_tiles, largest_tensor):
    n, d = 200, 3
    weight = crowded(d).repeat(9, 1)[:n].requires_grad_()
    with largest_tensor:
        hyperspherical_energy(weight, distance=distance, half_space=half_space).backward()
    assert n * d <= largest_tensor.elements < n * n / 40


def test_descent_lowers_the_energy():
    weight = randn(12, 3).requires_grad_()
    before = hyperspherical_energy(weight)
    before.backward()
    assert hyperspherical_energy(weight - 1e-3 * weight.grad / weight.grad.norm()) < before
