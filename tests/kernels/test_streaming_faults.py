"""What the streaming state notices: drift, tampering, and updates that cannot be."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import randn
from streams import WIDE, assert_same_bits, bits, factors

from sphere_kernels import gram
from sphere_kernels.streaming import HypersphereState, hypersphere

pytestmark = pytest.mark.usefixtures("each_impl")


def test_check_leaves_a_good_state_alone():
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        weight = randn(2, 40, 60, dtype=dtype)
        state = HypersphereState(weight)
        for k in range(9):
            left, right = factors(weight, 3, seed=k)
            state.update_(left, state.project(right))
        before, matrix = bits(state), state.gram
        assert 0 < state.check() <= bound
        assert state.gram is matrix
        assert_same_bits(bits(state), before)


@pytest.mark.parametrize("dtype", (*WIDE, torch.bfloat16), ids=str)
def test_check_restores_what_was_tampered_with(dtype):
    weight = randn(2, 40, 60, dtype=dtype)
    state = HypersphereState(weight)
    good = bits(state)
    for spoil in (float("nan"), float("inf"), 1.0):
        state.gram[1, 7] += spoil
        state.neuron_energy += 1
        assert not state.check() <= 0.001
        assert_same_bits(bits(state), good)
    state.master[1, 23] *= 1.001  # a matrix of the same directions
    assert state.check() > 1e-4
    torch.testing.assert_close(state.gram, gram(state.master))
    torch.testing.assert_close(state.neuron_energy, oracle.per_neuron(state.master), rtol=1e-6, atol=0)
    assert state.check() < 1e-6


def test_drift_is_measured_against_the_length_of_rows():
    weight = randn(40, 60, dtype=torch.float32)
    weight[3] *= 1e-4
    state = HypersphereState(weight)
    state.gram[3, 5:] *= 1.1
    state.gram[5:, 3] *= 1.1
    cosine = float((weight[5:] @ weight[3] / weight[5:].norm(dim=-1) / weight[3].norm()).abs().max())
    assert state.check() == pytest.approx(0.1 * cosine, rel=0.5)


@pytest.mark.parametrize("n", (17, 32, 48))
def test_every_pair_is_looked_at_in_time(n):
    weight = randn(n, 60, dtype=torch.float32)
    state = HypersphereState(weight, alpha=0.0)
    exact, nothing = state.gram.clone(), factors(weight, 0, seed=0)
    for i, j in ((0, 1), (1, 3), (n - 3, n - 1)):
        state.gram[i, j] = state.gram[j, i] = 30.0
        for _ in range(10 * n):
            state.update_(*nothing)
        assert torch.equal(state.gram, exact), (i, j)


def test_updates_look_for_drift():
    weight = randn(40, 60, dtype=torch.float32)
    state = HypersphereState(weight)
    state.gram[7] += 1
    state.gram[:, 7] += 1
    for k in range(hypersphere.CHECK_EVERY):
        state.update_(*factors(weight, 2, seed=k))
    torch.testing.assert_close(state.gram, weight @ weight.mT)
    torch.testing.assert_close(state.neuron_energy, oracle.per_neuron(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": torch.ones(4, 5).int()}, TypeError, "weight must be float64, .* got torch.int32"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have at least 2 dimensions .* got shape \[4\]"),
        ({"weight": torch.ones(0, 5)}, ValueError, r"weight must not be empty, got shape \[0, 5\]"),
        ({"weight": torch.ones(0, 4, 5)}, ValueError, "weight must not be empty"),
        ({"weight": torch.ones(1, 5).expand(4, 5)}, ValueError, "weight must own each of its elements"),
        ({"weight": torch.full((4, 5), float("nan"))}, ValueError, "weight must be finite"),
        ({"weight": torch.full((4, 5), float("inf"))}, ValueError, "weight must be finite"),
        ({"s": -1.0}, ValueError, "s must be finite and at least 0, got -1.0"),
        ({"s": "1"}, TypeError, "s must be a number, got str"),
        ({"energy_ratio": 1.1}, ValueError, "energy_ratio must be between 0 and 1, got 1.1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be between 0 and 1, got nan"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be finite and at least 1, got 0"),
        ({"refresh_every": 2.0}, TypeError, "refresh_every must be an integer, got float"),
        ({"subspace": "none"}, ValueError, "subspace must be one of current, pretrained, got 'none'"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, native, triton, cuda, got 'fast'"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is not available"),
        ({"weight": torch.zeros(4, 5), "subspace": "pretrained"}, ValueError, "weight must have a non-zero row"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        HypersphereState(**{"weight": torch.eye(4, 5), **options})


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


BAD_RIGHT = [
    ([[1.0]], TypeError, "right must be a tensor, got list"),
    (torch.ones(2, 9).long(), TypeError, "right must be float64, .* got torch.int64"),
    (torch.ones(9), ValueError, "right must have at least 2 dimensions"),
    (torch.ones(2, 8), ValueError, r"right must be \[b, 9\] for weight \[4, 9\], got shape \[2, 8\]"),
    (torch.ones(1, 2, 9), ValueError, r"right must be \[b, 9\] for weight \[4, 9\], got shape \[1, 2, 9\]"),
    (torch.ones(2, 9, device="meta"), ValueError, "right must be on the device of weight, cpu, got meta"),
]


BAD_FACTORS = [
    *((torch.ones(4, 2), *bad) for bad in BAD_RIGHT),
    (None, torch.ones(2, 9), ValueError, r"without left, right must be \[4, 9\] as the weight, got shape \[2, 9\]"),
    (None, torch.full((4, 9), float("nan")), FloatingPointError, "right holds NaN"),
    (None, torch.full((4, 9), 1e30), FloatingPointError, "rows of the weight must stay shorter"),
    ([[1.0]], torch.ones(2, 9), TypeError, "left must be a tensor, got list"),
    (
        torch.ones(4, 3),
        torch.ones(2, 9),
        ValueError,
        r"left must be \[4, 2\] to go with right \[2, 9\], got shape \[4,",
    ),
    (torch.ones(3, 2), torch.ones(2, 9), ValueError, r"left must be \[4, 2\]"),
    (torch.ones(1, 4, 2), torch.ones(2, 9), ValueError, r"left must be \[4, 2\]"),
    (torch.ones(4, 2, device="meta"), torch.ones(2, 9), ValueError, "left must be on the device of weight"),
    (torch.ones(4, 2).bool(), torch.ones(2, 9), TypeError, "left must be float64"),
    *((torch.full((4, 2), bad), torch.ones(2, 9), FloatingPointError, "left holds NaN") for bad in NOT_FINITE),
    *((torch.ones(4, 2), torch.full((2, 9), bad), FloatingPointError, "right holds NaN") for bad in NOT_FINITE),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("every", (1, 2))
def test_bad_updates_change_nothing(every, dtype):
    weight = randn(4, 9, dtype=dtype)
    state = HypersphereState(weight, refresh_every=every)
    for k in range(3):
        state.update_(*factors(weight, 2, seed=k))
    before = bits(state)
    for right, error, message in BAD_RIGHT:
        with pytest.raises(error, match=message):
            state.project(right)
        assert_same_bits(bits(state), before)
    for left, right, error, message in BAD_FACTORS:
        with pytest.raises(error, match=message):
            state.update_(left, right)
        assert_same_bits(bits(state), before)
    assert state.updates == 3


@pytest.mark.parametrize(
    ("dtype", "left", "right"),
    [
        (torch.float32, 1e60, 1.0),  # finite in fp64, not in the dtype of computation
        (torch.float32, 1.0, 1e60),
        (torch.bfloat16, 1e60, 1.0),
        (torch.float32, 1e30, 1e30),  # an entry of the weight
        (torch.float64, 1e200, 1e200),
        (torch.float16, 1e3, 1e3),  # an entry of the rounded weight
    ],
    ids=str,
)
def test_an_update_that_overflows_changes_nothing(dtype, left, right):
    weight = randn(4, 9, dtype=dtype)
    state = HypersphereState(weight)
    before = bits(state)
    with pytest.raises(FloatingPointError):
        state.update_(left * torch.ones(4, 1).double(), right * torch.ones(1, 9).double())
    assert_same_bits(bits(state), before)


def test_a_zero_matrix_has_no_directions():
    weight = torch.zeros(2, 4, 9)
    weight[0] = 1
    for every in (1, 2):
        state = HypersphereState(weight, refresh_every=every)
        before = bits(state)
        with pytest.raises(ValueError, match="weight must have a non-zero row"):
            state.project(torch.ones(2, 1, 9))
        assert_same_bits(bits(state), before)
    left, right = factors(weight, 2, seed=1)
    state = HypersphereState(weight)
    state.update_(left, right)  # one that was not projected gives it some
    assert state.project(right).isfinite().all()


def test_rows_that_shrink_little_by_little():
    """No step cancels much, all together do."""
    weight = randn(6, 20, dtype=torch.float32)
    state = HypersphereState(weight)
    for _ in range(9):
        state.update_(-0.8 * torch.eye(6)[:, :1], state.master[:1].clone())
    exact = gram(weight.double())
    torch.testing.assert_close(state.norms, exact.diagonal().sqrt(), rtol=1e-4, atol=0)
