"""A streaming state that is saved and goes on bit for bit, and the memory it takes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import randn
from streams import SCHEDULES, assert_same_bits, bits, factors, step

from sphere_kernels.streaming import HypersphereState, hypersphere

pytestmark = pytest.mark.usefixtures("each_impl")

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
