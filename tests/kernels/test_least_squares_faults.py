"""Histories that do not fit, keys and covariances that cannot be, and the memory of a solver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import randn
from histories import D, covariance, null_space
from streams import assert_same_bits, bits

from sphere_kernels.streaming import FactoredCovariance, IllConditioned, NullSpace, RecursiveLeastSquares

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("each_impl")


def rejected(solver, content):
    """Whether the content is refused with a TypeError or ValueError and the solver is as it was."""
    before, form = bits(solver), solver.form
    try:
        solver.load_state_dict(content)
    except (TypeError, ValueError):
        assert_same_bits(bits(solver), before)
        assert solver.form == form
        return True
    except Exception as error:
        print(type(error).__name__, error)
    return False


@pytest.mark.parametrize("form", ("dual", "full"))
def test_load_rejects_what_does_not_fit(form):
    solver = RecursiveLeastSquares(2.0, D, null_space(9), form=form)
    solver.commit(randn(3, D))
    state, name = solver.state_dict(), "dual" if form == "dual" else "inverse"
    value = state[name]
    assert rejected(solver, {})
    assert rejected(solver, {"edits": state["edits"]})
    assert rejected(solver, {name: value})
    assert rejected(solver, state | {"more": torch.ones(1)})
    assert rejected(solver, state | {"dual": value, "inverse": value})
    assert rejected(solver, state | {name: value.double()})
    assert rejected(solver, state | {name: value[:, :-1]})
    assert rejected(solver, state | {name: value[:-1]})
    assert rejected(solver, state | {name: value.unsqueeze(0)})
    assert rejected(solver, state | {"edits": torch.tensor(3.0)})


@pytest.mark.parametrize("form", ("dual", "full"))
def test_load_rejects_what_is_no_history(form):
    solver = RecursiveLeastSquares(2.0, D, null_space(9), form=form)
    solver.commit(randn(3, D))
    state, name = solver.state_dict(), "dual" if form == "dual" else "inverse"
    contents = {
        "counts": state | {"edits": torch.tensor([3, 3])},
        "no tensor": state | {name: state[name].tolist()},
        "a number": state | {"edits": 3},
        "a negative count": state | {"edits": torch.tensor(-3)},
    }
    assert [which for which, content in contents.items() if not rejected(solver, content)] == []


@pytest.mark.parametrize(("own", "other"), [("dual", "full"), ("full", "dual")])
def test_a_form_that_was_asked_for_stays(own, other):
    donor = RecursiveLeastSquares(2.0, D, form=other)
    donor.commit(randn(3, D))
    assert rejected(RecursiveLeastSquares(2.0, D, form=own), donor.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 4), ValueError, "ridge must be above 0, got 0.0"),
        ((-1.0, 4), ValueError, "ridge must be finite and at least 0, got -1.0"),
        ((float("nan"), 4), ValueError, "ridge must be finite"),
        ((None, 4), TypeError, "ridge must be a number, got NoneType"),
        ((1.0, 0), ValueError, "d must be finite and at least 1, got 0"),
        ((1.0, 4.0), TypeError, "d must be an integer, got float"),
        ((1.0, 4, null_space(2, 5)), ValueError, r"split 4 features, .* got \[5, 2\] and \[5, 3\]"),
        ((1.0, 4, NullSpace(torch.eye(4)[:, :1], torch.eye(4)[:, :2])), ValueError, "null_space"),
        ((1.0, 4, NullSpace(torch.full((4, 1), float("nan")), torch.eye(4)[:, 1:])), ValueError, "null_space"),
        ((1.0, 4, torch.eye(4)), TypeError, "null_space"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RecursiveLeastSquares(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "both"}, ValueError, "form must be one of auto, dual, full, got 'both'"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32 or float64, got torch.float16"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is not available"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, native, triton, cuda, got 'fast'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        RecursiveLeastSquares(1.0, 4, **options)


BAD_KEYS = [
    ([[1.0]], TypeError, "keys must be a tensor, got list"),
    (torch.ones(2, D).int(), TypeError, "keys must be float64, .* got torch.int32"),
    (torch.ones(D), ValueError, "keys must have at least 2 dimensions"),
    (torch.ones(2, D - 1), ValueError, rf"keys must be \[b, {D}\], got shape \[2, {D - 1}\]"),
    (torch.ones(D, 2), ValueError, rf"keys must be \[b, {D}\]"),
    (torch.ones(1, 2, D), ValueError, rf"keys must be \[b, {D}\]"),
    (torch.ones(2, D, device="meta"), ValueError, "keys must be on cpu, got meta"),
    *((torch.full((2, D), bad), FloatingPointError, "NaN or inf") for bad in (float("nan"), float("inf"))),
]


@pytest.mark.parametrize("form", ("dual", "full"))
def test_bad_keys_change_nothing(form):
    solver = RecursiveLeastSquares(1.0, D, form=form)
    solver.commit(randn(3, D))
    before = bits(solver)
    for keys, error, message in BAD_KEYS:
        for call in (solver.solve, solver.commit):
            with pytest.raises(error, match=message):
                call(keys)
            assert_same_bits(bits(solver), before)
    with pytest.raises(ValueError, match="commit without keys must follow a solve"):
        solver.commit()


@pytest.mark.parametrize("form", ("dual", "full"))
@pytest.mark.parametrize("b", (1, 2, 5))
def test_keys_that_overflow_change_nothing(form, b):
    solver = RecursiveLeastSquares(1.0, D, form=form)
    solver.commit(randn(3, D))
    before = bits(solver)
    for call in (solver.solve, solver.commit):
        with pytest.raises((ValueError, FloatingPointError)):
            call(torch.full((b, D), 1e300, dtype=torch.float64))
        assert_same_bits(bits(solver), before)


@pytest.mark.parametrize("form", ("dual", "full"))
def test_a_ridge_that_is_too_small(form):
    """Where fp32 would give garbage: what is refused in fp32 is solved in fp64."""
    keys = 1e3 * randn(6, D)
    for dtype in (torch.float32, torch.float64):
        solver = RecursiveLeastSquares(1.0, D, form=form, dtype=dtype)
        solver.commit(1e-2 * keys)
        before = bits(solver)
        if dtype == torch.float32:
            for call in (solver.solve, solver.commit):
                with pytest.raises(
                    IllConditioned, match=r"ridge 1 is too small for keys of length .* in torch.float32"
                ):
                    call(keys)
            assert_same_bits(bits(solver), before)
        else:
            found = solver.solve(keys)
    system = keys.T @ keys + 1e-4 * keys.T @ keys + torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(system, keys.T).T
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("form", ("dual", "full"))
def test_modes_of_torch_change_no_bit(form):
    def run():
        solver = RecursiveLeastSquares(2.0, D, null_space(20), form=form)
        rights = []
        for k in range(3):
            rights.append(solver.solve(randn(3, D, dtype=torch.float32, seed=k)))
            solver.commit(None if k else randn(3, D, dtype=torch.float32, seed=9))
        return rights, bits(solver)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run()
    with torch.inference_mode():
        inference = run()
    for rights, state in (run(), mixed, inference):
        assert all(torch.equal(a, b) for a, b in zip(rights, plain[0], strict=True))
        assert_same_bits(state, plain[1])


@pytest.mark.parametrize("m", (None, 20, 390))
def test_no_matrix_beside_the_dual(m, largest_tensor):
    d, space = 400, null_space(m, 400)
    solver = RecursiveLeastSquares(2.0, d, space, form="dual")
    with largest_tensor:
        for k in range(4):
            solver.solve(randn(10, d, dtype=torch.float32, seed=k))
            solver.commit()
    assert largest_tensor.elements <= 2 * 40 * d  # the history and room to grow


MEMORY = """
import sys
import torch
from pathlib import Path
from sphere_kernels.streaming import NullSpace, RecursiveLeastSquares

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6

def batch(solver, keys):
    solver.solve(keys)
    solver.commit()
    solver.solve(keys)
    solver.commit(keys)

d, b, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
batch(RecursiveLeastSquares(1.0, 300, form=form), torch.randn(b, 300))  # libraries are loaded
removed = torch.nn.functional.normalize(torch.randn(d, 1), dim=0)
keys = torch.randn(b, d)
kept = torch.empty(1, 1).expand(d, d - 1)  # not looked at
solver = RecursiveLeastSquares(100.0, d, NullSpace(kept, removed), form=form)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
batch(solver, keys)
print(status("VmHWM") - before)
"""


def peak(d, b, form):
    """MB of two batches, in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(d), str(b), form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(each_impl):
    assert peak(30000, 5, "auto") < 60  # a matrix of features squared would be 3600
    if each_impl == "native":  # plain torch forms the product that it subtracts
        assert peak(3000, 20, "full") < 30  # the inverse itself is 36


@pytest.mark.parametrize(
    ("moment", "weight", "error", "message"),
    [
        (covariance(D, keys=10), 1.0, ValueError, r"covariance \[24, 24\] times 1 must be positive definite"),
        (torch.zeros(3, 3), 1.0, ValueError, "must be positive definite"),
        (-torch.eye(3), 1.0, ValueError, "must be positive definite"),
        (torch.full((3, 3), float("nan")), 1.0, ValueError, "covariance"),
        (torch.diag(torch.tensor([1.0, float("inf"), 1.0])), 1.0, ValueError, "covariance"),
        (torch.ones(0, 0), 1.0, ValueError, "covariance"),
        (torch.ones(3, 4), 1.0, ValueError, r"covariance must be \[d, d\], got shape \[3, 4\]"),
        (torch.ones(2, 3, 3), 1.0, ValueError, r"covariance must be \[d, d\], got shape \[2, 3, 3\]"),
        ([[1.0]], 1.0, TypeError, "covariance must be a tensor, got list"),
        (torch.eye(3), -1.0, ValueError, "weight must be"),
        (torch.eye(3), 0.0, ValueError, "weight must be|times 0 must be positive"),
        (torch.eye(3), "1", TypeError, "weight must be a number, got str"),
    ],
)
def test_bad_covariances(moment, weight, error, message):
    with pytest.raises(error, match=message):
        FactoredCovariance(moment, weight)


def test_bad_keys_for_a_covariance():
    solver = FactoredCovariance(covariance(D), 1.0)
    for keys, error, message in BAD_KEYS:
        with pytest.raises(error, match=message):
            solver.solve(keys)
    for b in (1, 3):
        with pytest.raises((ValueError, FloatingPointError)):
            solver.solve(torch.full((b, D), 1e200, dtype=torch.float64))
