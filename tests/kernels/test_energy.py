"""Values of the energy against the fp64 oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import DTYPES, EXPONENTS, VARIANTS, crowded, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_kernels import hyperspherical_energy, orthogonal_energy

pytestmark = pytest.mark.usefixtures("each_impl")


def energies(weight, s=1.0, distance="euclidean", half_space=False):
    return hyperspherical_energy(weight, s, reduction="none", distance=distance, half_space=half_space)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, s, distance, half_space, small_tiles):
    weight = randn(29, 33, dtype=dtype)
    expected = oracle.per_neuron(weight, s, distance, half_space)
    actual = energies(weight, s, distance, half_space)
    plain = oracle.plain(weight, s, distance, half_space).double()
    budget = 2 * ((plain - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max())
    error = (actual - expected).abs().max()
    print(f"error {error:.2e} budget {budget:.2e}")
    assert actual.dtype == torch.float64
    assert error <= budget
    # Low precision goes through fp32 arithmetic, so it is far better than its budget.
    assert error <= (1e-13 if dtype == torch.float64 else 2e-6) * expected.abs().max()


@pytest.mark.parametrize("n", (1, 2, 6, 7, 8, 13, 14, 15, 22))
@pytest.mark.parametrize("d", (1, 2, 5))
def test_sizes_around_the_tile(n, d, small_tiles):
    weight = randn(3, n, d)
    for distance, half_space in VARIANTS:
        expected = oracle.per_neuron(weight, 1.0, distance, half_space)
        torch.testing.assert_close(energies(weight, 1.0, distance, half_space), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("n", (255, 256, 257, 300))
def test_sizes_around_the_real_tile(n):
    weight = randn(n, 20, dtype=torch.float32)
    torch.testing.assert_close(energies(weight), oracle.per_neuron(weight), rtol=1e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 9), st.integers(1, 5), st.sampled_from(VARIANTS))
def test_any_shape(leading, n, d, variant):
    weight = randn(*leading, n, d)
    actual = energies(weight, 1.0, *variant)
    assert actual.shape == weight.shape[:-1]
    torch.testing.assert_close(actual, oracle.per_neuron(weight, 1.0, *variant), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_coincident_rows(dtype, s, distance, half_space, small_tiles):
    weight = crowded().to(dtype)
    expected = oracle.per_neuron(weight, s, distance, half_space)
    # The oracle rounds unit rows to eps = 1e-16, which limits both at t = 1e-4 to 1e-12 s; fp32 bulk pairs to 1e-4.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(energies(weight, s, distance, half_space), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("t", (2e-2, 1e-2, 1e-4))
def test_near_duplicates_in_fp32_are_not_left_to_cancellation(t):
    weight = torch.tensor([[1.0, 0.0], [1.0, t]], dtype=torch.float32)
    expected = oracle.per_neuron(weight)
    torch.testing.assert_close(energies(weight), expected, rtol=1e-10, atol=0)
    mirrored = weight * torch.tensor([[1.0], [-1.0]])
    # The far half of the pair is not recomputed: eps of its 1/2 beside 1/t.
    torch.testing.assert_close(
        energies(mirrored, half_space=True), oracle.per_neuron(mirrored, half_space=True), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("s", EXPONENTS)
def test_exact_duplicates_take_the_clamp(s):
    weight = randn(1, 6).expand(2, 6)
    expected = torch.full((2,), 1e-6, dtype=torch.float64)
    torch.testing.assert_close(energies(weight, s), oracle.riesz(expected, s), rtol=1e-9, atol=0)


def test_zero_row_is_at_distance_one():
    weight = torch.cat([torch.zeros(1, 4, dtype=torch.float64), 1e9 * torch.eye(4, dtype=torch.float64)])
    torch.testing.assert_close(energies(weight, 3.0)[0], torch.tensor(4.0, dtype=torch.float64))


def test_half_space_is_the_energy_of_both_signs(small_tiles):
    weight = randn(12, 5)
    both = torch.cat([weight, -weight])
    for distance, reduction in itertools.product(("euclidean", "angular"), ("sum", "mean")):
        half = hyperspherical_energy(weight, distance=distance, half_space=True, reduction=reduction)
        full = hyperspherical_energy(both, distance=distance, reduction=reduction)
        torch.testing.assert_close(half, full, rtol=1e-10, atol=0)
    torch.testing.assert_close(energies(weight, half_space=True), energies(both)[:12], rtol=1e-10, atol=0)


def test_reductions():
    weight = randn(2, 11, 5)
    each = energies(weight)
    torch.testing.assert_close(hyperspherical_energy(weight), each.sum(-1))
    torch.testing.assert_close(hyperspherical_energy(weight, reduction="mean"), each.sum(-1) / 110)
    with pytest.raises(ValueError, match="at least 2 neurons, got 1"):
        hyperspherical_energy(weight[:, :1], reduction="mean")


def test_empty():
    assert hyperspherical_energy(torch.zeros(0, 5)).item() == 0
    assert hyperspherical_energy(randn(1, 5)).item() == 0
    assert hyperspherical_energy(torch.zeros(0, 3, 5)).shape == (0,)
    assert energies(torch.zeros(2, 0, 5)).shape == (2, 0)


def test_strides():
    weight = randn(20, 15)
    storage = torch.full((40, 30), float("nan"), dtype=torch.float64)
    storage[::2, ::2] = weight
    for view in (weight.T.contiguous().T, storage[::2, ::2]):
        torch.testing.assert_close(energies(view), energies(weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(energies(weight.expand(3, 20, 15))[2], energies(weight), rtol=1e-12, atol=0)
    stacked = randn(4, 3, 5, 6).transpose(0, 1)
    torch.testing.assert_close(energies(stacked)[2, 1], energies(stacked[2, 1]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", (1e30, 1e-20, 1e-40))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_huge_and_tiny_rows(scale, dtype):
    weight = randn(9, 6).mul_(torch.where(torch.arange(9) % 2 == 0, 1.0, scale)[:, None]).to(dtype)
    for distance, half_space in VARIANTS:
        expected = oracle.per_neuron(weight, 1.0, distance, half_space)
        torch.testing.assert_close(energies(weight, 1.0, distance, half_space), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_gives_nan(bad, dtype, small_tiles):
    weight = crowded().to(dtype).repeat(2, 1, 1)
    clean = energies(weight)
    weight[1, 4, 2] = bad
    for distance, half_space, s in itertools.product(("euclidean", "angular"), (False, True), (0.0, 1.0)):
        assert energies(weight, s, distance, half_space)[1].isnan().all()
        assert energies(weight[1, 4:5], s, distance, half_space).isnan().all()
    torch.testing.assert_close(energies(weight)[0], clean[0], rtol=0, atol=0)


def test_overflowing_norm_gives_nan():
    weight = randn(3, 4)
    weight[0] = 1e200
    assert energies(weight).isnan().all()


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
def test_orthogonal_energy(s, distance, half_space):
    value = orthogonal_energy(7, s, distance=distance, half_space=half_space)
    assert value == pytest.approx(oracle.orthogonal(7, s, distance, half_space), rel=1e-9)
    points = 14 if half_space else 7
    mean = orthogonal_energy(7, s, distance=distance, half_space=half_space, reduction="mean")
    assert mean == pytest.approx(value / (points * (points - 1)), rel=1e-12)


def test_orthogonal_energy_of_a_known_layer():
    assert orthogonal_energy(4096) == pytest.approx(1.1860e7, rel=1e-4)
    assert orthogonal_energy(0) == orthogonal_energy(1) == 0
    with pytest.raises(ValueError, match="n must be finite and at least 0, got -1"):
        orthogonal_energy(-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"s": -1.0}, ValueError, "s must be finite and at least 0, got -1.0"),
        ({"s": float("nan")}, ValueError, "s must be finite and at least 0, got nan"),
        ({"s": float("inf")}, ValueError, "s must be finite"),
        ({"s": "1"}, TypeError, "s must be a number, got str"),
        ({"reduction": "max"}, ValueError, "reduction must be one of sum, mean, none, got 'max'"),
        ({"distance": "cosine"}, ValueError, "distance must be one of euclidean, angular, got 'cosine'"),
        ({"half_space": 1}, TypeError, "half_space must be True or False, got 1"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, native, triton, cuda, got 'fast'"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have at least 2 dimensions .* got shape \[3\]"),
        ({"weight": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "weight must be float64, .* got torch.int64"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        hyperspherical_energy(**({"weight": torch.ones(3, 3)} | options))
