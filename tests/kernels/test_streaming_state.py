"""A weight that follows its low-rank updates, against the same by dense d x d matrices in fp64."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cases import DTYPES, crowded, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_kernels import gram
from sphere_kernels.streaming import HypersphereState, hypersphere

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = [(6, 20), (20, 6), (9, 9), (1, 7), (7, 1), (1, 1), (2, 5, 12), (2, 12, 5), (2, 3, 6, 11)]
SCHEDULES = list(itertools.product((1, 3, 10), ("current", "pretrained")))
WIDE = (torch.float64, torch.float32)


class Dense:
    """What the state must agree with: everything anew from the weight, matrix by matrix, C in full."""

    def __init__(self, weight, s=1.0, energy_ratio=0.5, alpha=0.5, refresh_every=1, subspace="current"):
        self.weight = weight.detach().double().clone()
        self.s, self.ratio, self.alpha = s, energy_ratio, alpha
        self.every, self.subspace, self.updates = refresh_every, subspace, 0
        self.projectors, self.ranks, self.shares = self._directions()

    def _directions(self):
        d, projectors, ranks, shares = self.weight.shape[-1], [], [], []
        for weight in self.weight.reshape(-1, *self.weight.shape[-2:]):
            values, vectors = torch.linalg.eigh(oracle.second_moment(weight))
            numerical = int(torch.linalg.matrix_rank(oracle.unit_rows(weight)))
            rank = min(oracle.rank_rule(values.flip(0).clamp(min=0), self.ratio), numerical)
            basis = vectors[:, d - rank :]
            projectors.append(basis @ basis.T)
            ranks.append(rank)
            shares.append(values[d - rank :].sum() / values.sum())
        leading = self.weight.shape[:-2]
        ranks, shares = torch.tensor(ranks).view(leading), torch.stack(shares).view(leading)
        return torch.stack(projectors).view(*leading, d, d), ranks, shares

    def project(self, right):
        return right.double() - self.alpha * right.double() @ self.projectors

    def update_(self, left, right):
        self.weight += left.double() @ right.double()
        self.updates += 1
        if self.subspace == "current" and self.updates % self.every == 0:
            self.projectors, self.ranks, self.shares = self._directions()

    def per_neuron(self):
        return oracle.per_neuron(self.weight, self.s)


def factors(weight, b, seed, size=0.1):
    """An update's factors, in fp32 or fp64; each batch turns the directions by far more than any tolerance."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    *leading, n, d = weight.shape
    return size * randn(*leading, n, b, dtype=wide, seed=seed), randn(*leading, b, d, dtype=wide, seed=seed + 1000)


def bits(state):
    """Copies of all that a state holds."""
    return {name: value.clone() for name, value in {**state.state_dict(), "weight": state.weight}.items()}


def assert_same_bits(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def assert_agrees(state, dense, right, tolerance):
    """Weight, Gram matrix, energies, directions and what they do to a right factor."""
    wide = state.master.dtype
    scale = max(1.0, float(dense.weight.abs().max())) ** 2 * dense.weight.shape[-1]
    torch.testing.assert_close(state.master.double(), dense.weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.gram.double(), dense.weight @ dense.weight.mT, rtol=0, atol=tolerance * scale)
    assert torch.equal(state.gram, state.gram.mT)
    expected = dense.per_neuron()
    torch.testing.assert_close(state.neuron_energy, expected, rtol=100 * tolerance, atol=100 * tolerance)
    assert torch.equal(state.energy, state.neuron_energy.sum(-1))
    torch.testing.assert_close(state.norms, oracle.norms(dense.weight), rtol=0, atol=tolerance * scale**0.5)
    projected = state.project(right)
    assert projected.dtype == wide
    allowed = 100 * tolerance * (1 + right.double().norm(dim=-1, keepdim=True))
    assert ((projected.double() - dense.project(right)).abs() <= allowed).all()
    assert torch.equal(state.rank, dense.ranks)
    torch.testing.assert_close(state.held_ratio, dense.shares, rtol=0, atol=100 * tolerance)
    basis = state.directions.basis.double()
    torch.testing.assert_close(basis @ basis.mT, dense.projectors, rtol=0, atol=100 * tolerance)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}  # of a handful of updates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_updates_of_any_width(shape, dtype):
    weight = randn(*shape, dtype=dtype)
    state, dense = HypersphereState(weight, s=2.0), Dense(weight, s=2.0)
    tolerance = TOLERANCE[state.master.dtype]
    for k, b in enumerate((2, 0, 1, 25, 3)):
        left, right = factors(weight, b, seed=10 * k, size=0.1 / max(1, b))
        assert_agrees(state, dense, right, tolerance)
        right = state.project(right)
        state.update_(left, right)
        dense.update_(left, right)
    assert_agrees(state, dense, right, tolerance)
    assert state.updates == 5
    assert torch.equal(weight, state.master.to(dtype))
    excess = dense.per_neuron().sum(-1) - oracle.orthogonal(shape[-2], 2.0, "euclidean", False)
    torch.testing.assert_close(state.excess, excess, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 9),
    st.integers(2, 12),
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from(SCHEDULES),
    st.sampled_from((0.0, 0.3, 1.0)),
)
def test_any_stream(leading, n, d, widths, schedule, s):
    weight = randn(*leading, n, d, seed=n)
    state, dense = HypersphereState(weight, s, 0.4, 0.7, *schedule), Dense(weight, s, 0.4, 0.7, *schedule)
    for k, b in enumerate(widths):
        left, right = factors(weight, b, seed=k)
        if k % 2:
            right = state.project(right)
        state.update_(left, right)
        dense.update_(left, right)
    assert_agrees(state, dense, factors(weight, 2, seed=99)[1], 1e-11)


@pytest.mark.parametrize(("every", "subspace"), SCHEDULES)
@pytest.mark.parametrize("shape", [(7, 30), (30, 7)], ids=str)
def test_directions_are_those_of_the_schedule(shape, every, subspace):
    weight = randn(*shape)
    state = HypersphereState(weight, refresh_every=every, subspace=subspace)
    dense = Dense(weight, refresh_every=every, subspace=subspace)
    seen = []
    for k in range(2 * every + 3):
        left, right = factors(weight, 2, seed=k)
        if (
            k % 4 != 3 and k != every
        ):  # those of an update that projected nothing, its turn among them, serve later ones
            expected = dense.project(right)
            seen.append(dense.projectors)
            right = state.project(right)
            torch.testing.assert_close(right, expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(state.project(right), dense.project(right), rtol=0, atol=1e-10)
        state.update_(left, right)
        dense.update_(left, right)
    moved = [float((a - b).norm()) for a, b in itertools.pairwise(seen)]
    assert max(moved) == 0 if subspace == "pretrained" else max(moved) > 0.05  # a wrong turn would be seen


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("ratio", (0.0, 0.9, 1.0))
@pytest.mark.parametrize("alpha", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (2, 6, 20)], ids=str)
def test_extreme_settings(shape, alpha, ratio, dtype):
    weight = randn(*shape, dtype=dtype)
    state = HypersphereState(weight, energy_ratio=ratio, alpha=alpha)
    dense = Dense(weight, energy_ratio=ratio, alpha=alpha)
    for k in range(4):
        left, right = factors(weight, 3, seed=k)
        projected = state.project(right)
        torch.testing.assert_close(
            projected.double(), dense.project(right), rtol=0, atol=1e3 * TOLERANCE[dtype] if ratio else 1e-4
        )
        assert torch.equal(state.rank, dense.ranks if alpha else torch.zeros_like(dense.ranks))
        if alpha == 0:
            assert projected is right
        if alpha == 1:  # nothing is left along the directions
            assert (projected.double() @ dense.projectors).abs().max() <= 1e3 * TOLERANCE[dtype]
        state.update_(left, projected)
        dense.update_(left, projected)
    torch.testing.assert_close(state.energy, dense.per_neuron().sum(-1), rtol=1e-6, atol=0)


def test_nothing_is_decomposed_where_alpha_is_zero(monkeypatch):
    monkeypatch.setattr(hypersphere, "by_eigh", None)
    for subspace in ("current", "pretrained"):
        weight = torch.zeros(4, 9)  # which has no directions
        state = HypersphereState(weight, alpha=0.0, refresh_every=2, subspace=subspace)
        for k in range(3):
            left, right = factors(weight, 2, seed=k)
            state.update_(left, state.project(right))
        assert state.rank == 0
        assert set(state.state_dict()) == {"master", "gram", "neuron_energy", "updates"}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_near_duplicates_and_zero_rows(dtype):
    weight = torch.cat([crowded(9), 0.3 * randn(24, 31, seed=5)], 1)
    weight[[8, 9, 10], 9:] = weight[7, 9:] / weight[7, :9].norm()  # near the unit row, as in the first columns
    weight[[13, 14, 15], 9:] = -weight[[8, 9, 10], 9:]
    for twin, row, factor in ((3, 1, 1), (20, 1, 2), (5, 2, -1), (21, 2, -3), (17, 17, 0)):
        weight[twin, 9:] = factor * weight[row, 9:]
    weight = weight.to(dtype)
    state, dense = HypersphereState(weight, energy_ratio=0.7), Dense(weight, energy_ratio=0.7)
    for k in range(12):
        left, right = factors(weight, 2, seed=k)
        left *= weight.norm(dim=-1, keepdim=True)
        for twin, row, factor in ((3, 1, 1), (20, 1, 2), (5, 2, -1), (21, 2, -3)):
            left[twin] = factor * left[row]
        right = state.project(right)
        state.update_(left, right)
        dense.update_(left, right)
        # Pairs nearer than the rounding of the weight: the energy is that of the weight as written.
        expected = oracle.per_neuron(state.master)
        torch.testing.assert_close(state.neuron_energy, expected, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=0)
    assert state.master[17].abs().max() == 0
    assert state.gram[17].abs().max() == 0
    _, right = factors(weight, 4, seed=50)
    torch.testing.assert_close(state.project(right).double(), dense.project(right), rtol=0, atol=1e3 * TOLERANCE[dtype])


def test_a_row_that_an_update_cancels():
    for seed in range(12):  # what rounding leaves of its squared norm may be below zero
        weight = randn(8, 40, dtype=torch.float32, seed=seed)
        state, dense = HypersphereState(weight), Dense(weight)
        left, right = -torch.eye(8)[:, 2:3], weight[2:3].clone()
        state.update_(left, right)
        dense.update_(left, right)
        _, right = factors(weight, 3, seed=seed)
        assert weight[2].abs().max() == 0
        assert state.project(right).isfinite().all()
        assert state.norms[2] <= 0.02
        state.check()  # which puts it right where something was left
        state.update_(torch.zeros(8, 0), torch.zeros(0, 40))
        assert state.gram[2].abs().max() == 0
        torch.testing.assert_close(state.project(right).double(), dense.project(right), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (2, 6, 40)], ids=str)
def test_rows_as_short_as_the_epsilon_of_the_unit_rows(shape):
    weight = randn(*shape, dtype=torch.float32)
    weight *= 1e-10 * torch.logspace(0, 0.5, shape[-1])
    if len(shape) == 3:
        weight[0] = randn(6, 40, seed=1)  # one of ordinary rows beside it
    state, dense = HypersphereState(weight), Dense(weight)
    for k in range(3):
        left, right = factors(weight, 2, seed=k, size=1e-11)
        torch.testing.assert_close(state.project(right).double(), dense.project(right), rtol=0, atol=1e-4)
        assert torch.equal(state.rank, dense.ranks)
        state.update_(left, right)
        dense.update_(left, right)


def spectrum(n, d, spread, r=5):
    """A weight of about r dominant directions, their eigenvalues over a range of about ``spread``, and a weak bulk."""
    left, right = torch.linalg.qr(randn(n, n, seed=3)).Q, torch.linalg.qr(randn(d, n, seed=4)).Q
    values = torch.full((n,), 1e-3 * spread**-0.5, dtype=torch.float64)
    values[:r] = torch.logspace(0, -1, r, base=spread**0.5, dtype=torch.float64)
    return (left * values) @ right.mT


def shares(weight):
    values = torch.linalg.eigvalsh(oracle.second_moment(weight)).flip(0)
    return values, values.cumsum(0) / values.sum()


@pytest.mark.parametrize("spread", (1.0, 10.0, 60.0, 3e3, 3e4))
def test_with_and_without_a_basis(spread, monkeypatch):
    weight = spectrum(48, 160, spread).float()
    values, share = shares(weight)
    ratio = float(share[3:5].mean())
    exact = Dense(weight, energy_ratio=ratio, alpha=1.0)
    right = randn(20, 160, dtype=torch.float32, seed=8)
    expected, length = exact.project(right), right.double().norm(dim=-1, keepdim=True)
    assert exact.ranks == 5
    error = {}
    for way, bound in (("basis", 0.0), ("rows", float("inf")), ("own choice", None)):
        with monkeypatch.context() as patch:
            if bound is not None:
                patch.setattr(hypersphere, "SPREAD", bound)
            state = HypersphereState(weight.clone(), energy_ratio=ratio, alpha=1.0)
            error[way] = float(((state.project(right) - expected) / length).abs().max())
            assert state.rank == 5
    print(f"spread {float(values[0] / values[4]):.3g}", error)
    # Of a vector of length 1, of which the directions hold about 0.2.
    assert error["basis"] <= 5e-7
    assert error["own choice"] <= 5e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weights_are_written_through(dtype):
    start, steps = randn(6, 20, dtype=dtype), 3
    storage = torch.full((13, 62), float("nan"), dtype=dtype)
    layouts = {
        "contiguous": torch.empty(6, 20, dtype=dtype),
        "of a Conv1D": torch.empty(20, 6, dtype=dtype).T,
        "strided": storage[1::2, 1:61:3],
    }
    found = {}
    for name, weight in layouts.items():
        weight.copy_(start)
        state = HypersphereState(weight)
        for k in range(steps):
            left, right = factors(start, 3, seed=k)
            state.update_(left, state.project(right))
        assert torch.equal(weight, state.master.to(dtype)), name
        assert state.weight.data_ptr() == weight.data_ptr(), name
        found[name] = weight.double(), state.energy
    for name, (weight, energy) in found.items():
        exact, exact_energy = found["contiguous"]
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(weight, exact, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(energy, exact_energy, rtol=1e-6, atol=0, msg=name)
    layouts["strided"].fill_(float("nan"))
    assert storage.isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("every", (1, 3))
def test_leading_dimensions_that_do_not_merge(every, dtype):
    weight = randn(3, 2, 70, 90, dtype=dtype).transpose(0, 1)
    state, dense = HypersphereState(weight, refresh_every=every), Dense(weight, refresh_every=every)
    for k in range(4):
        left, right = (t.transpose(0, 1) for t in factors(torch.empty(3, 2, 70, 90), 3, seed=k))
        assert_agrees(state, dense, right, 1e-5)
        state.update_(left, right)
        dense.update_(left, right)
    assert torch.equal(weight, state.master.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(6, 20), (2, 20, 6)], ids=str)
def test_parameters(shape, dtype):
    plain = randn(*shape, dtype=dtype)
    parameter = torch.nn.Parameter(plain.clone())
    states = HypersphereState(plain, refresh_every=2), HypersphereState(parameter, refresh_every=2)
    for k in range(4):
        left, right = factors(plain, 2, seed=k)
        for state in states:
            projected = state.project(right.requires_grad_())
            assert not projected.requires_grad
            state.update_(left.requires_grad_(), projected)
    assert_same_bits(bits(states[0]), bits(states[1]))
    assert torch.equal(parameter, plain)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad is None
    assert not any(value.requires_grad for value in states[1].state_dict().values())


def test_factors_of_any_dtype_and_strides():
    weight = randn(6, 20, dtype=torch.float32)
    left, right = factors(weight, 2, seed=0)
    left, right = left.bfloat16(), right.half()
    expected = HypersphereState(weight.clone(), refresh_every=2)
    projected = expected.project(right.float())
    expected.update_(left.float(), projected)
    views = {
        "narrow": lambda tensor: tensor,
        "wide": torch.Tensor.double,
        "turned": lambda tensor: tensor.T.contiguous().T,
        "strided": lambda tensor: tensor.repeat_interleave(2, 1)[:, ::2],
        "negative bit": lambda tensor: torch._neg_view(-tensor),
        "negative bit of the dtype of the weight": lambda tensor: torch._neg_view(-tensor.float()),
    }
    for name, view in views.items():
        state = HypersphereState(weight.clone(), refresh_every=2)
        again = state.project(view(right))
        torch.testing.assert_close(again, projected, msg=name)
        state.update_(view(left), again)
        for key, value in state.state_dict().items():
            if key != "basis":
                torch.testing.assert_close(value, expected.state_dict()[key], msg=f"{name}, {key}")


def test_inference_mode():
    weight = randn(6, 20, dtype=torch.float32)
    left, right = factors(weight, 2, seed=0)
    states = [HypersphereState(weight.clone(), refresh_every=2) for _ in range(2)]
    states[0].update_(left, states[0].project(right))
    with torch.inference_mode():
        states[1].update_(left, states[1].project(right))
    assert_same_bits(bits(states[0]), bits(states[1]))


def test_same_bits_under_autocast():
    weight = randn(6, 20, dtype=torch.float32)
    left, right = factors(weight, 2, seed=0)
    states = [HypersphereState(weight.clone(), refresh_every=2) for _ in range(2)]
    states[0].update_(left, states[0].project(right))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states[1].update_(left, states[1].project(right))
    assert_same_bits(bits(states[0]), bits(states[1]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounding_does_not_add_up(dtype):
    weight = randn(32, 64, dtype=dtype)
    naive, exact = weight.clone(), weight.double()
    state, error, naive_error = HypersphereState(weight), [], []
    for k in range(200):
        left, right = factors(weight, 2, seed=k, size=2e-3)
        right = state.project(right)
        state.update_(left, right)
        naive += (left @ right).to(dtype)
        exact += left.double() @ right.double()
        assert torch.equal(weight, state.master.to(dtype))
        error.append(float((weight - exact).norm()))
        naive_error.append(float((naive - exact).norm()))
    assert (state.master - exact).abs().max() <= 1e-5
    assert (weight - exact).abs().max() <= 0.501 * torch.finfo(dtype).eps * exact.abs().max().log2().ceil().exp2()
    assert error[-1] <= 1.1 * error[50]  # by then rounding is all of it
    assert naive_error[-1] >= 1.7 * naive_error[50] >= 5 * error[-1]
    expected = oracle.per_neuron(exact).sum()
    torch.testing.assert_close(state.energy, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("every", (1, 10))
def test_two_hundred_updates_in_fp32(every):
    weight = randn(128, 256, dtype=torch.float32)
    state, exact = HypersphereState(weight, refresh_every=every), weight.double()
    for k in range(200):
        left, right = factors(weight, 10, seed=k, size=0.02)
        right = state.project(right)
        state.update_(left, right)
        exact += left.double() @ right.double()
    expected = oracle.per_neuron(exact).sum()
    error = float((state.energy / expected - 1).abs())
    print(f"energy {error:.2e}, drift {state.check():.2e}")
    assert error <= 1e-8
    assert state.check() <= 2e-6
    dense = Dense(exact, refresh_every=every)
    _, right = factors(weight, 10, seed=999)
    length = right.norm(dim=-1, keepdim=True)
    assert ((state.project(right) - dense.project(right)) / length).abs().max() <= 1e-3


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
    (None, torch.ones(2, 9), TypeError, "left must be a tensor, got NoneType"),
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


def step(state, k, project=True):
    left, right = factors(state.weight, 2, seed=k)
    state.update_(left, state.project(right) if project else right)


STORED = [
    ((6, 20), torch.float32),
    ((20, 6), torch.float32),
    ((6, 20), torch.bfloat16),
    ((2, 5, 12), torch.float64),
    ((2, 12, 5), torch.float16),
]


@pytest.mark.parametrize(("every", "subspace"), SCHEDULES)
@pytest.mark.parametrize(("shape", "dtype"), STORED, ids=str)
def test_a_loaded_state_goes_on_bit_for_bit(shape, dtype, every, subspace):
    options = {"refresh_every": every, "subspace": subspace, "alpha": 0.8, "energy_ratio": 0.6}
    state = HypersphereState(randn(*shape, dtype=dtype), **options)
    steps, kept = 2 * every + 2, {}
    for k in range(steps):
        kept[k, "before the directions"] = bits(state)
        if k % 3 != 2:
            state.project(factors(state.weight, 2, seed=k)[1])
        kept[k, "after the directions"] = bits(state)
        step(state, k, project=k % 3 != 2)
    final, after = bits(state), state.project(factors(state.weight, 2, seed=77)[1])
    for (start, when), saved in kept.items():
        other = HypersphereState(randn(*shape, dtype=dtype, seed=5), **options)
        step(other, 1000)  # what it knew must be gone
        saved = {name: value for name, value in saved.items() if name != "weight"}
        other.load_state_dict(saved)
        assert torch.equal(other.weight, saved["master"].to(dtype))
        assert other.updates == start
        assert_same_bits({name: value for name, value in bits(other).items() if name in saved}, saved)
        for k in range(start, steps):
            step(other, k, project=k % 3 != 2)
        assert_same_bits(bits(other), final)
        assert torch.equal(other.project(factors(state.weight, 2, seed=77)[1]), after), (start, when)
        assert torch.equal(other.rank, state.rank)


def test_load_does_not_share_memory():
    state = HypersphereState(randn(6, 20, dtype=torch.float32), refresh_every=3)
    other = HypersphereState(randn(6, 20, dtype=torch.float32, seed=2), refresh_every=3)
    step(state, 0)
    other.load_state_dict(state.state_dict())
    before = bits(state)
    for k in range(1, 6):
        step(other, k)
    assert_same_bits(bits(state), before)
    other.load_state_dict(other.state_dict())  # its own
    saved = io.BytesIO()
    torch.save(other.state_dict(), saved)
    saved.seek(0)
    state.load_state_dict(torch.load(saved, weights_only=True))
    assert_same_bits(bits(state), bits(other))


@pytest.mark.parametrize("subspace", ("current", "pretrained"))
def test_a_state_recomputed_on_the_way_goes_on_bit_for_bit(subspace, monkeypatch):
    monkeypatch.setattr(hypersphere, "DRIFT", {torch.float32: -1.0})  # every look finds drift
    monkeypatch.setattr(hypersphere, "CHECK_EVERY", 5)
    state = HypersphereState(randn(6, 20, dtype=torch.float32), refresh_every=3, subspace=subspace)
    kept = []
    for k in range(8):
        state.project(factors(state.weight, 2, seed=k)[1])
        if k == 3:  # the directions that are due now follow: a state loaded here has the new Gram matrix only
            before = state.gram.clone()
            state.recompute()
            assert not torch.equal(state.gram, before)
        kept.append(bits(state))
        step(state, k)
    final = bits(state)
    for start, saved in enumerate(kept):
        saved.pop("weight")
        other = HypersphereState(state.weight.clone(), refresh_every=3, subspace=subspace)
        other.load_state_dict(saved)
        for k in range(start, 8):
            if k == 3 and start < 3:
                other.recompute()
            step(other, k)
        assert_same_bits(bits(other), final)


def altered(state):
    """Contents that do not fit a state of ``[4, 9]`` with a basis, each in one way."""
    for name, value in state.items():
        yield f"no {name}", {k: v for k, v in state.items() if k != name}
        yield f"{name} of another dtype", state | {name: value.to(torch.float16)}
        yield f"{name} of another rank", state | {name: value.unsqueeze(0)}
        if value.ndim:
            yield f"{name} of another size", state | {name: torch.cat([value, value])}
            yield f"{name} that is shorter", state | {name: value[..., :-1]}
        yield f"{name} that is no tensor", state | {name: value.tolist()}
    yield "something more", state | {"more": torch.ones(1)}
    yield "nothing", {}
    yield "a negative count", state | {"updates": torch.tensor(-1)}


@pytest.mark.parametrize("subspace", ("current", "pretrained"))
def test_load_rejects_what_does_not_fit(subspace):
    state = HypersphereState(randn(4, 9, dtype=torch.float32), refresh_every=3, subspace=subspace)
    for k in range(4):
        step(state, k)
    before = bits(state)
    donor = HypersphereState(randn(4, 9, dtype=torch.float32, seed=9), refresh_every=3, subspace=subspace)
    for k in range(5):
        step(donor, k)
    accepted = []
    for name, content in altered(donor.state_dict()):
        try:
            state.load_state_dict(content)
        except (TypeError, ValueError):
            assert_same_bits(bits(state), before)
        except Exception as error:
            accepted.append(f"{name}: {type(error).__name__}")
        else:
            accepted.append(name)
            state.load_state_dict({k: v for k, v in before.items() if k != "weight"})
    assert accepted == []


def test_repetition_changes_no_bit():
    found = []
    for _ in range(2):
        state = HypersphereState(randn(2, 30, 50, dtype=torch.float32))
        for k in range(12):
            step(state, k)
        found.append(bits(state))
    assert_same_bits(*found)


def test_threads_change_no_bit(each_impl):
    if each_impl == "reference":
        pytest.skip("torch's own products depend on the number of threads")
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = HypersphereState(randn(300, 70, dtype=torch.float32), alpha=0.0)
            for k in range(11):
                state.update_(*factors(state.weight, 5, seed=k))
            found.append(bits(state))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.parametrize(("every", "subspace"), SCHEDULES[:3])
def test_no_tensor_is_larger_than_the_weight(every, subspace, largest_tensor):
    weight = randn(8, 3000, dtype=torch.float32)
    with largest_tensor:
        state = HypersphereState(weight, refresh_every=every, subspace=subspace)
        for k in range(3):
            step(state, k)
        state.check()
        assert state.directions.basis.shape[0] == 3000
    assert largest_tensor.elements <= weight.numel()


MEMORY = """
import sys
import torch
from pathlib import Path
from sphere_kernels.streaming import HypersphereState

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6

def batch(state, n, d, b):
    state.update_(0.01 * torch.ones(n, b), state.project(torch.randn(b, d)))

n, d, b, every = map(int, sys.argv[1:])
small = HypersphereState(torch.randn(300, 400), refresh_every=every)
batch(small, 300, 400, b)  # libraries are loaded
state = HypersphereState(torch.randn(n, d), refresh_every=every)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
batch(state, n, d, b)
state.check()
print(status("VmHWM") - before)
"""


def peak(n, d, b, every):
    """MB of a batch and a look at the drift, in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, *map(str, (n, d, b, every))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_batch(each_impl):
    for every in (1, 10):
        found, n, d, b = peak(1024, 3584, 100, every), 1024, 3584, 100
        print(f"{each_impl}, refreshed every {every}: {found:.1f} MB, matrices of {4 * n * n / 1e6:.1f} MB")
        # Four n x n (a copy of M, eigenvectors, LAPACK's workspace), a few factors, what the kernels pack.
        numbers, fixed = 4 * n * n + 4 * b * (n + d), 21 if each_impl == "native" else 5
        assert found <= 4 * numbers / 1e6 + fixed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_memory_of_the_size_of_features_squared():
    assert peak(16, 30000, 5, 1) < 100  # one matrix would be 3600
