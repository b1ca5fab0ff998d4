"""A streaming state whose directions are tracked, against dense matrices in fp64 and against itself, resumed."""

from __future__ import annotations

import math

import pytest
import torch
from cases import randn
from streams import assert_same_bits, bits, factors
from test_directions_tracked import check_share
from test_streaming_saved import altered

from sphere_kernels.streaming import HypersphereState, tracker

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = [(96, 200), (200, 96), (2, 96, 130)]
RATIO = 0.4


def tracked(weight, **options):
    return HypersphereState(weight, **{"energy_ratio": RATIO, "directions": "tracked", **options})


def step(state, k, project=True, size=3e-3):
    """Of about 2 % of the weight's length."""
    left, right = factors(state.weight, 4, seed=k, size=size)
    state.update_(left, state.project(right) if project else right)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_hold_the_share_through_a_stream(shape, dtype):
    state, seen = tracked(randn(*shape, dtype=dtype)), []
    for k in range(15):
        _, right = factors(state.weight, 3, seed=50 + k)
        projected, found = state.project(right), state.directions
        seen.append(state.renewal)
        assert state.renewal == ("tracked" if found.method == "tracked" else "start")
        assert torch.equal(state.rank, found.rank)
        torch.testing.assert_close(state.held_bound, found.energy_bound)
        basis = found.basis.double()
        expected = right.double() - 0.5 * right.double() @ basis @ basis.mT
        close = 1e-11 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(projected.double(), expected, rtol=0, atol=close)
        if len(shape) == 2:
            check_share(state.master, found, RATIO)
        assert (state.held_ratio > RATIO).all()
        step(state, k)
    assert seen == ["start", *["tracked"] * 14]


def test_weight_and_energy_do_not_depend_on_how_directions_are_found():
    states = [HypersphereState(randn(*SHAPES[0], dtype=torch.float32), directions=how) for how in ("exact", "tracked")]
    for k in range(5):
        left, right = factors(states[0].weight, 4, seed=k, size=3e-3)
        for state in states:
            state.update_(left, right)
    for name, value in states[0].state_dict().items():
        assert torch.equal(value, states[1].state_dict()[name]), name
    exact, followed = (state.project(right) for state in states)
    assert states[0].renewal is None
    assert states[1].renewal == "tracked"
    assert ((exact - followed).norm() / exact.norm()) < 0.05  # the edge of a dense spectrum differs


def test_another_weight_is_decomposed():
    state = tracked(randn(*SHAPES[0]))
    step(state, 0)
    state.update_(None, randn(*SHAPES[0], seed=1) - state.weight)
    assert state.renewal == "short"
    check_share(state.master, state.directions, RATIO)
    step(state, 2)
    assert state.renewal == "tracked"


def test_every_so_often_an_eigendecomposition_checks_the_rank(monkeypatch):
    monkeypatch.setattr(tracker, "EXACT_EVERY", 4)
    state, seen = tracked(randn(*SHAPES[0])), []
    for k in range(10):
        seen.append(state.renewal)
        step(state, k)
    assert seen == ["start", *["tracked"] * 3, "check", *["tracked"] * 3, "check", "tracked"]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (1, 9), (96, 200)], ids=str)
def test_where_too_many_are_needed_all_are_exact(shape):
    ratio = 0.9 if shape[0] > 20 else 0.5
    state, exact = (HypersphereState(randn(*shape), energy_ratio=ratio, directions=how) for how in ("tracked", "exact"))
    for k in range(3):
        left, right = factors(state.weight, 2, seed=k)
        torch.testing.assert_close(state.project(right), exact.project(right), rtol=0, atol=1e-12)
        assert state.renewal in ("start", "short")
        for each in (state, exact):
            each.update_(left, right)


@pytest.mark.parametrize("options", [{"subspace": "pretrained"}, {"alpha": 0.0}], ids=str)
def test_nothing_is_tracked_where_directions_do_not_move(options):
    state, exact = (HypersphereState(randn(*SHAPES[0]), directions=how, **options) for how in ("tracked", "exact"))
    for each in (state, exact):
        step(each, 0)
    assert state.renewal is None
    assert_same_bits(bits(state), bits(exact))


STORED = [((96, 200), torch.float32), ((200, 96), torch.bfloat16), ((2, 96, 130), torch.float64)]


@pytest.mark.parametrize("every", (1, 3))
@pytest.mark.parametrize(("shape", "dtype"), STORED, ids=str)
def test_a_loaded_state_goes_on_bit_for_bit(shape, dtype, every, monkeypatch):
    monkeypatch.setattr(tracker, "EXACT_EVERY", 3)
    state, kept, said = tracked(randn(*shape, dtype=dtype), refresh_every=every), {}, {}
    steps = 3 * every + 3
    for k in range(steps):
        kept[k, "before the directions"] = bits(state)
        if k % 3 != 2:
            state.project(factors(state.weight, 2, seed=k)[1])
        kept[k, "after the directions"] = bits(state)
        said[k] = state.renewal, state.rank.tolist(), state.held_bound.tolist()
        step(state, k, project=k % 3 != 2)
    final, after = bits(state), state.project(factors(state.weight, 2, seed=77)[1])
    assert {"tracked", "check"} <= {renewal for renewal, _, _ in said.values()}
    for (start, when), saved in kept.items():
        other = tracked(randn(*shape, dtype=dtype, seed=5), refresh_every=every)
        step(other, 1000)  # what it knew must be gone
        saved = {name: value for name, value in saved.items() if name != "weight"}
        other.load_state_dict(saved)
        assert_same_bits({name: value for name, value in bits(other).items() if name in saved}, saved)
        for k in range(start, steps):
            assert said[k] == (other.renewal, other.rank.tolist(), other.held_bound.tolist()), (start, when, k)
            step(other, k, project=k % 3 != 2)
        assert_same_bits(bits(other), final)
        assert torch.equal(other.project(factors(state.weight, 2, seed=77)[1]), after), (start, when)


def test_an_update_undone_leaves_no_trace():
    state = tracked(randn(*SHAPES[0], dtype=torch.float32))
    step(state, 0)
    before = bits(state)
    step(state, 1)
    step(state, 2)
    state.load_state_dict({name: value for name, value in before.items() if name != "weight"})
    again = tracked(randn(*SHAPES[0], dtype=torch.float32))
    step(again, 0)
    for each in (state, again):
        step(each, 3)
    assert_same_bits(bits(state), bits(again))


def test_a_whole_update_and_a_look_that_finds_drift(monkeypatch):
    from sphere_kernels.streaming import hypersphere

    monkeypatch.setattr(hypersphere, "DRIFT", {torch.float32: -1.0})  # every look finds some
    monkeypatch.setattr(hypersphere, "CHECK_EVERY", 2)
    state = tracked(randn(*SHAPES[0], dtype=torch.float32))
    for k in range(4):
        step(state, k)
    state.update_(None, 0.01 * randn(*SHAPES[0], seed=9))
    assert state.renewal == "tracked"
    check_share(state.master, state.directions, RATIO)
    first = state.directions
    state.recompute()
    torch.testing.assert_close(state.directions.basis, first.basis, rtol=0, atol=0)


@pytest.mark.parametrize("every", (1, 3))
def test_load_rejects_what_does_not_fit(every):
    state, donor = (tracked(randn(*SHAPES[0], dtype=torch.float32, seed=k), refresh_every=every) for k in range(2))
    for k in range(5):
        step(state, k)
        step(donor, k)
    before, accepted = bits(state), []
    contents = dict(altered(donor.state_dict())) | {
        "no such renewal": donor.state_dict() | {"renewal": torch.tensor(4)},
        "of an exact state": HypersphereState(randn(*SHAPES[0], dtype=torch.float32)).state_dict(),
    }
    contents.pop("block that is shorter")  # may be of other directions
    for name, content in contents.items():
        try:
            state.load_state_dict(content)
        except (TypeError, ValueError):
            assert_same_bits(bits(state), before)
        else:
            accepted.append(name)
            state.load_state_dict({k: v for k, v in before.items() if k != "weight"})
    assert accepted == []


def _never_short(side, block, ratio, _track=tracker.by_tracking):
    """The last directions whatever became of the weight: what a tracker without a fallback has."""
    return _track(side, block, ratio / 4)


MUTANTS = {
    "no fallback": ("by_tracking", _never_short),
    "no check of the rank": ("EXACT_EVERY", math.inf),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, monkeypatch):
    monkeypatch.setattr(tracker, "EXACT_EVERY", 3)

    def checks():
        state = tracked(randn(*SHAPES[0]))
        for k, size in enumerate((3e-3, 3e-3, 3e-3, 3.0, 3e-3)):
            check_share(state.master, state.directions, RATIO)
            assert (state.renewal == "check") == (k == 3)
            step(state, k, size=size)
        check_share(state.master, state.directions, RATIO)

    checks()
    monkeypatch.setattr(tracker, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        checks()


def test_bad_argument():
    with pytest.raises(ValueError, match="directions must be one of exact, tracked, got 'followed'"):
        tracked(randn(4, 9), directions="followed")
