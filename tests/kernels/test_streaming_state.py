"""A weight that follows its low-rank updates, against the same by dense d x d matrices in fp64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import DTYPES, crowded, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import SCHEDULES, TOLERANCE, WIDE, Dense, assert_agrees, assert_same_bits, bits, factors

from sphere_kernels.streaming import HypersphereState, hypersphere

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = [(6, 20), (20, 6), (9, 9), (1, 7), (7, 1), (1, 1), (2, 5, 12), (2, 12, 5), (2, 3, 6, 11)]


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
        assert set(state.state_dict()) == {"master", "gram", "neuron_energy", "lengths", "updates"}


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


def test_a_row_that_an_update_cancels(monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", "ieee")  # a row times -1 is exact in fp32, not in tf32x3
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


_PLACES = {
    "rows": lambda whole: whole,
    "turned": lambda whole: whole.mT.contiguous().mT,  # as of Conv1D
    "every other": lambda whole: whole.repeat_interleave(2, -1)[..., ::2],
    "part": lambda whole: torch.cat([whole, whole], -2)[..., : whole.shape[-2], :],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("shape", [(33, 70), (70, 33), (2, 5, 12), (1, 1)], ids=str)
def test_updated_is_what_update_would_leave(shape, place, dtype):
    """Bit for bit over a stream of updates, low-rank and whole; asking changes nothing."""
    weight = _PLACES[place](randn(*shape, dtype=dtype))
    state = HypersphereState(weight)
    for k, b in enumerate((2, 0, 17, None, 1)):
        left, right = factors(weight, b or 2, seed=k)
        if b is None:
            left, right = None, left @ right
        elif b == 0:
            left, right = left[..., :0], right[..., :0, :]
        before = bits(state)
        told = state.updated(left, right)
        assert_same_bits(bits(state), before)
        assert told.dtype == dtype and told.shape == weight.shape
        assert told.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        state.update_(left, right)
        assert torch.equal(told, weight)
        assert b == 0 or not torch.equal(told, before["weight"])


def test_updated_takes_the_factors_that_update_takes():
    state = HypersphereState(randn(6, 20, dtype=torch.float32))
    for left, right in ((randn(6, 2), randn(3, 20)), (randn(5, 2), randn(2, 20)), (None, randn(6, 19))):
        with pytest.raises(ValueError) as told:
            state.updated(left, right)
        with pytest.raises(ValueError) as done:
            state.update_(left, right)
        assert str(told.value) == str(done.value)


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


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"subspace": "pretrained"}, {"alpha": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_a_whole_update_leaves_a_state_as_if_new(dtype, options):
    """But for directions that outlive the weight that they were computed for."""
    weight, right = randn(2, 6, 40, dtype=dtype), randn(2, 3, 40, seed=3)
    state = HypersphereState(weight, **options)
    held = state.project(right)
    for k in range(2):
        state.update_(None, 0.1 * randn(2, 6, 40, seed=k + 1))
    fresh = HypersphereState(state.master.clone())
    assert torch.equal(state.gram, fresh.gram) and torch.equal(state.neuron_energy, fresh.neuron_energy)
    assert torch.equal(weight, state.master.to(dtype)) and state.updates == 2
    expected = held if "subspace" in options or "alpha" in options else fresh.project(right)
    torch.testing.assert_close(state.project(right), expected, rtol=0, atol=1e-4)
