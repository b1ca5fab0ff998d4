"""Low-rank updates of a Gram matrix and the energy of the result, against the dense formulas in fp64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import DTYPES, EXPONENTS, VARIANTS, randn, update_inputs, update_to_crowded
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_kernels import gram, gram_update_energy_, hyperspherical_energy

pytestmark = pytest.mark.usefixtures("each_impl")

WIDE = (torch.float64, torch.float32)


def rounding(impl, dtype):
    """Relative error of an energy whose inner products were rounded to ``dtype`` (but for the reference's)."""
    return 1e-7 if impl != "reference" and dtype == torch.float32 else 1e-12


def dense(matrix, left, cross, inner):
    """``M'`` written out from the upper triangle of ``M``."""
    matrix, left, cross, inner = (tensor.double() for tensor in (matrix, left, cross, inner))
    matrix = matrix.triu() + matrix.triu(1).mT
    return matrix + cross @ left.mT + left @ cross.mT + left @ inner @ left.mT


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_within_budget(dtype, s, distance, half_space, small_tiles, each_impl):
    (matrix, *factors), weight = update_inputs(randn(29, 33), 5, dtype)
    expected, eps = dense(matrix, *factors), torch.finfo(dtype).eps
    left, cross, inner = factors
    plain = matrix + cross @ left.mT + left @ cross.mT + left @ inner @ left.mT
    energy = gram_update_energy_(matrix, *factors, s, distance=distance, half_space=half_space)
    budget = 2 * ((plain.double() - expected).abs().max() + eps * expected.abs().max())
    assert matrix.dtype == dtype
    assert (matrix - expected).abs().max() <= budget
    assert torch.equal(matrix, matrix.mT)
    # The energy is that of the matrix as written; native rounds its inner products to the matrix's dtype.
    assert energy.dtype == torch.float64
    options, tolerance = (s, distance, half_space), rounding(each_impl, dtype)
    torch.testing.assert_close(energy, oracle.per_neuron_of_gram(matrix, *options), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(energy, oracle.per_neuron(weight, *options), rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("n", (1, 2, 6, 7, 8, 13, 14, 15, 22))
@pytest.mark.parametrize("b", (0, 1, 3, 20))
def test_sizes_around_the_tile(n, b, small_tiles):
    for distance, half_space in VARIANTS:
        (matrix, *factors), _ = update_inputs(randn(3, n, 40), b)
        expected = dense(matrix, *factors)
        energy = gram_update_energy_(matrix, *factors, distance=distance, half_space=half_space)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)
        expected = oracle.per_neuron_of_gram(matrix, 1.0, distance, half_space)
        torch.testing.assert_close(energy, expected, rtol=1e-11, atol=1e-12)


def test_across_real_tiles():
    (matrix, *factors), weight = update_inputs(randn(300, 50), 4, torch.float32)
    energy = gram_update_energy_(matrix, *factors)
    assert torch.equal(matrix, matrix.mT)
    torch.testing.assert_close(energy, oracle.per_neuron(weight), rtol=1e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 9), st.integers(0, 3), st.sampled_from(VARIANTS))
def test_any_shape(leading, n, b, variant):
    (matrix, *factors), weight = update_inputs(randn(*leading, n, 6), b)
    expected = dense(matrix, *factors)
    energy = gram_update_energy_(matrix, *factors, 1.0, weight=weight, distance=variant[0], half_space=variant[1])
    assert energy.shape == (*leading, n)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(energy, oracle.per_neuron(weight, 1.0, *variant), rtol=1e-8, atol=1e-12)


def test_an_empty_update_leaves_the_matrix(each_impl):
    matrix = gram(randn(20, 9, dtype=torch.float32))
    before, nothing = matrix.clone(), torch.zeros(20, 0)
    energy = gram_update_energy_(matrix, nothing, nothing, torch.zeros(0, 0))
    assert torch.equal(matrix, before)
    torch.testing.assert_close(
        energy, oracle.per_neuron_of_gram(before), rtol=rounding(each_impl, before.dtype), atol=0
    )


def test_only_the_upper_triangle_is_read(small_tiles):
    (matrix, *factors), _ = update_inputs(randn(2, 20, 9), 3)
    spoilt = torch.where(torch.ones(20, 20, dtype=torch.bool).tril(-1), float("nan"), matrix)
    energy = gram_update_energy_(matrix, *factors)
    assert torch.equal(gram_update_energy_(spoilt, *factors), energy)
    assert torch.equal(spoilt, matrix)


def test_diagonal_is_rounded_once():
    (matrix, *factors), _ = update_inputs(randn(40, 60), 64, torch.float32)
    expected = dense(matrix, *factors).diagonal()
    gram_update_energy_(matrix, *factors)
    error = (matrix.diagonal() - expected).abs() / expected
    assert error.max() <= 0.501 * torch.finfo(torch.float32).eps


def test_strided_matrix(small_tiles):
    (start, *factors), _ = update_inputs(randn(2, 3, 10, 12), 3)
    expected = dense(start, *factors)
    storage = torch.full((3, 2, 20, 30), float("nan"), dtype=torch.float64)
    layouts = {
        "contiguous": torch.empty_like(start),
        "transposed": torch.empty_like(start).mT,
        "leading dimensions that do not merge": storage[:, :, ::2, ::3].transpose(0, 1),
        "parameter": torch.nn.Parameter(torch.empty_like(start)),
    }
    for name, matrix in layouts.items():
        matrix.data.copy_(start)
        energy = gram_update_energy_(matrix, *factors)
        torch.testing.assert_close(matrix.detach(), expected, msg=name)
        torch.testing.assert_close(energy, oracle.per_neuron_of_gram(expected), msg=name)
        assert not energy.requires_grad
    untouched = torch.ones(20, 30, dtype=torch.bool)
    untouched[::2, ::3] = False
    assert storage[:, :, untouched].isnan().all()


def test_strided_factors():
    (start, left, cross, inner), weight = update_inputs(randn(10, 12), 3)
    expected = dense(start, left, cross, inner).expand(4, 10, 10)
    views = [tensor.expand(4, *tensor.shape) for tensor in (left.T.contiguous().T, cross, inner.T)]
    matrix = start.repeat(4, 1, 1)
    energy = gram_update_energy_(matrix, *views, weight=weight.T.contiguous().T.expand(4, 10, 12))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(energy[3], oracle.per_neuron(weight), rtol=1e-11, atol=0)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("s", EXPONENTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_coincident_rows_come_from_the_weight(dtype, s, distance, half_space, small_tiles):
    before, factors, after = update_to_crowded(dtype)
    matrix = gram(before).to(dtype)
    options = {"distance": distance, "half_space": half_space}
    energy = gram_update_energy_(matrix, *factors, s, weight=after.to(dtype), **options)
    # As for the energy of the weight itself: fp64 is limited by the unit rows, fp32 by the bulk.
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype]
    expected = oracle.per_neuron(after, s, distance, half_space)
    torch.testing.assert_close(energy, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_of_any_dtype(dtype):
    weight = randn(12, 6, dtype=dtype)
    weight[4] = weight[3] * (1 + 0.01 * randn(6, seed=2)).to(dtype)
    matrix, nothing = gram(weight), torch.zeros(12, 0, dtype=gram(weight).dtype)
    energy = gram_update_energy_(matrix, nothing, nothing, nothing[:0], weight=weight)
    torch.testing.assert_close(energy, oracle.per_neuron(weight), rtol=1e-6, atol=0)


def test_near_rows_without_the_weight():
    weight = randn(6, 5)
    for t, tolerance in ((1e-2, 1e-10), (1e-4, 1e-6)):
        weight[1] = weight[0] + t * weight[0].norm() * torch.nn.functional.normalize(weight[2], dim=0)
        (matrix, *factors), after = update_inputs(weight, 2)
        energy = gram_update_energy_(matrix, *factors)
        torch.testing.assert_close(energy, oracle.per_neuron(after), rtol=tolerance, atol=0)
    weight[1] = weight[0]
    matrix, nothing = gram(weight), torch.zeros(6, 0, dtype=torch.float64)
    energy = gram_update_energy_(matrix, nothing, nothing, nothing[:0])
    torch.testing.assert_close(energy[:2], oracle.per_neuron(weight)[:2], rtol=1e-9, atol=0)  # the clamp


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_inner_products_above_one_are_clamped(distance, half_space):
    matrix = torch.tensor([[1.0, 1 + 1e-6, 0], [1 + 1e-6, 1, 0], [0, 0, 1]])
    nothing = torch.zeros(3, 0)
    energy = gram_update_energy_(matrix, nothing, nothing, nothing[:0], distance=distance, half_space=half_space)
    torch.testing.assert_close(energy[:2], torch.full((2,), 1e6, dtype=torch.float64), rtol=1e-5, atol=0)


def test_zero_rows():
    weight = randn(7, 5)
    weight[2] = 0
    (matrix, left, cross, inner), _ = update_inputs(weight, 3)
    left[2] = 0
    energy = gram_update_energy_(matrix, left, cross, inner)
    assert matrix[2].abs().max() == 0
    torch.testing.assert_close(energy[2], torch.tensor(6.0, dtype=torch.float64), rtol=1e-7, atol=0)


def test_negative_diagonal_is_a_zero_row():
    matrix = torch.eye(4) + 0.1
    matrix[3], matrix[:, 3] = 1e-7, 1e-7
    matrix[3, 3] = -1e-9
    nothing = torch.zeros(4, 0)
    for distance, right in (("euclidean", 1.0), ("angular", torch.pi / 2)):
        energy = gram_update_energy_(matrix, nothing, nothing, nothing[:0], distance=distance)
        assert energy[3].item() == pytest.approx(3 / right, rel=1e-7)
    assert matrix[3, 3] == torch.tensor(-1e-9)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_not_finite_gives_nan(bad, dtype, small_tiles):
    for (distance, half_space), s in itertools.product(VARIANTS, (0.0, 1.0)):
        options = {"distance": distance, "half_space": half_space}
        for i, j in ((3, 15), (4, 5), (6, 6)):  # across tiles, within one, a norm
            (matrix, *factors), weight = update_inputs(randn(2, 20, 9), 2, dtype)
            matrix[1, i, j] = matrix[1, j, i] = bad
            energy = gram_update_energy_(matrix, *factors, s, weight=weight, **options)
            assert energy[0].isfinite().all()
            assert energy[1].isnan().nonzero().flatten().tolist() == ([i, j] if i < j else list(range(20)))
        (matrix, *factors), _ = update_inputs(randn(2, 20, 9), 2, dtype)
        factors[0][1, 4] = bad
        assert gram_update_energy_(matrix, *factors, s, **options)[1].isnan().all()
        lone = torch.full((1, 1), abs(bad), dtype=dtype)
        nothing = lone[:, :0]
        assert gram_update_energy_(lone, nothing, nothing, nothing[:0], s, **options).isnan().all()


def test_fifty_updates_in_fp32():
    weight = randn(128, 64, dtype=torch.float32)
    matrix = gram(weight)
    for k in range(50):
        left, right = 0.1 * randn(128, 4, dtype=torch.float32, seed=k), 0.1 * randn(4, 64, dtype=torch.float32, seed=-k)
        cross, inner = weight @ right.mT, right @ right.mT
        weight += left @ right
        energy = gram_update_energy_(matrix, left, cross, inner, weight=weight if k % 2 else None)
        exact = hyperspherical_energy(weight.double()).item()
        assert energy.sum().item() == pytest.approx(exact, rel=1e-8)
    assert torch.equal(matrix, matrix.mT)


def test_in_place_counts_as_a_change_for_autograd():
    (matrix, *factors), _ = update_inputs(randn(4, 5), 2)
    leaf = torch.nn.Parameter(matrix)
    loss = leaf.square().sum()
    assert not gram_update_energy_(leaf, *[factor.requires_grad_() for factor in factors]).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gram": [[1.0]]}, TypeError, "gram must be a tensor, got list"),
        ({"gram": torch.ones(4, 4).half()}, TypeError, "gram must be float64 or float32, got torch.float16"),
        ({"gram": torch.ones(4)}, ValueError, r"gram must have at least 2 dimensions .* got shape \[4\]"),
        ({"gram": torch.ones(4, 5)}, ValueError, r"gram must be square, \[..., n, n\], got shape \[4, 5\]"),
        ({"gram": torch.ones(1, 4).expand(4, 4)}, ValueError, "gram must own each of its elements"),
        (
            {"left": torch.ones(4, 2).double()},
            TypeError,
            "left must be of the dtype of gram, torch.float32, got torch.fl",
        ),
        (
            {"cross": torch.ones(4, 2).half()},
            TypeError,
            "cross must be of the dtype of gram, torch.float32, got torch.fl",
        ),
        ({"inner": None}, TypeError, "inner must be a tensor, got NoneType"),
        ({"left": torch.ones(3, 2)}, ValueError, r"left must have shape \[4, 2\] to follow gram .* got \[3, 2\]"),
        ({"left": torch.ones(1, 4, 2)}, ValueError, r"left must have shape \[4, 2\] .* got \[1, 4, 2\]"),
        ({"cross": torch.ones(4, 3)}, ValueError, r"cross must have shape \[4, 2\] to follow gram .* got \[4, 3\]"),
        ({"inner": torch.ones(3, 2)}, ValueError, r"inner must have shape \[2, 2\] to follow gram .* got \[3, 2\]"),
        ({"weight": torch.ones(3, 5)}, ValueError, r"weight must have shape \[4, 5\] to follow gram .* got \[3, 5\]"),
        ({"weight": torch.ones(4, 5).int()}, TypeError, "weight must be float64, .* got torch.int32"),
        ({"inner": torch.ones(2, 2, device="meta")}, ValueError, "inner must be on the device of gram, cpu, got meta"),
        (
            {"weight": torch.ones(4, 5, device="meta")},
            ValueError,
            "weight must be on the device of gram, cpu, got meta",
        ),
        ({"s": -1.0}, ValueError, "s must be finite and at least 0, got -1.0"),
        ({"distance": "cosine"}, ValueError, "distance must be one of euclidean, angular, got 'cosine'"),
        ({"half_space": 1}, TypeError, "half_space must be True or False, got 1"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, native, triton, cuda, got 'fast'"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is not available for gram_update_energy_"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    matrix = torch.eye(4)
    arguments = {"gram": matrix, "left": torch.ones(4, 2), "cross": torch.ones(4, 2), "inner": torch.ones(2, 2)}
    with pytest.raises(error, match=message):
        gram_update_energy_(**(arguments | options))
    assert torch.equal(matrix, torch.eye(4))
