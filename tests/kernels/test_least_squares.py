"""The right factors of updates, batch after batch, against the published dense formulas in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import DTYPES, randn
from histories import FORMS, D, covariance, null_space
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import assert_same_bits, bits

from sphere_kernels.streaming import FactoredCovariance, NullSpace, RecursiveLeastSquares, least_squares

pytestmark = pytest.mark.usefixtures("each_impl")


KEPT = (None, 0, 1, 9, 17, 18, 23, 24)  # of 24: rank of P; up to 17 its own coordinates are the cheaper ones


ROOT = Path(__file__).parents[2]


class Published:
    """``(P (K K^T + C) + ridge I) D^T = P K R^T``, anew each time."""

    def __init__(self, ridge, d, space=None):
        self.eye = torch.eye(d, dtype=torch.float64)
        self.projector = self.eye if space is None else space.kept @ space.kept.T
        self.ridge, self.history = ridge, torch.zeros(d, d, dtype=torch.float64)

    def solve(self, keys):
        keys = keys.double().T
        system = self.projector @ (keys @ keys.T + self.history) + self.ridge * self.eye
        return torch.linalg.solve(system, self.projector @ keys).T

    def commit(self, keys):
        self.history += keys.double().T @ keys.double()


def assert_solved(actual, expected, tolerance):
    size = expected.abs().max() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * float(size) + 1e-15)


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest number of a solution


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("two_keys", (False, True), ids=("one key", "two keys"))
@pytest.mark.parametrize("m", KEPT)
@pytest.mark.parametrize("form", FORMS)
def test_as_published(form, m, two_keys, dtype, monkeypatch):
    monkeypatch.setattr(least_squares, "SLAB", 5)
    space = null_space(m)
    solver = RecursiveLeastSquares(2.0, D, space, form=form, dtype=dtype)
    published = Published(2.0, D, space)
    width, total = D if m is None or m >= 18 else m, 0  # coordinates
    for k, b in enumerate((1, 3, 0, 2, 4, 1, 1, 6, 40, 0, 2)):
        keys = randn(b, D, dtype=dtype, seed=k)
        right = solver.solve(keys)
        assert right.dtype == dtype
        assert right.is_contiguous()
        assert_solved(right, published.solve(keys), TOLERANCE[dtype])
        if space is not None:
            assert (right.double() @ space.removed).abs().sum() <= 1e3 * TOLERANCE[dtype]
        if two_keys:
            again = keys + 0.3 * randn(b, D, dtype=dtype, seed=k + 100)
            solver.commit(again)
            published.commit(again)
        else:
            solver.commit()
            published.commit(keys)
        total += b
        assert solver.edits == total
        assert solver.form == (("full" if 4 * total > 3 * width else "dual") if form == "auto" else form)
        stored = solver.state_dict()["inverse" if solver.form == "full" else "dual"]
        assert stored.shape == ((width, width) if solver.form == "full" else (total, width))
        if solver.form == "full":
            assert torch.equal(stored, stored.mT)


def test_forms_agree_on_the_inverse():
    solvers = {form: RecursiveLeastSquares(0.5, D, null_space(9), form=form, dtype=torch.float64) for form in FORMS}
    for k in range(5):
        for solver in solvers.values():
            solver.commit(randn(4, D, seed=k))
    dual, inverse = solvers["dual"].state_dict()["dual"], solvers["full"].state_dict()["inverse"]
    keys = torch.cat([randn(4, D, seed=k) for k in range(5)]) @ null_space(9).kept
    exact = torch.linalg.inv(0.5 * torch.eye(9, dtype=torch.float64) + keys.T @ keys)
    torch.testing.assert_close(inverse, exact)
    torch.testing.assert_close(torch.eye(9, dtype=torch.float64) / 0.5 - dual.T @ dual, exact)
    assert solvers["auto"].form == "full"


@pytest.mark.parametrize("d", (1, 10, 100, 14336))
def test_coordinates_by_the_numbers_stored(d):
    for m in {0, 1, 7, 8, 73, 74, 10494, 10495, d} & set(range(d + 1)):
        some = torch.empty(1, 1)
        space = NullSpace(some.expand(d, m), some.expand(d, d - m))
        assert space.reduced == (m < (3**0.5 - 1) * d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ("dual", "full"))
def test_keys_of_any_dtype_and_strides(form, dtype):
    solver, published = RecursiveLeastSquares(2.0, D, null_space(18), form=form), Published(2.0, D, null_space(18))
    storage = torch.full((2 * D, 18), float("nan"), dtype=dtype)
    for k in range(4):
        keys = storage[::2, 1::3].T
        keys.copy_(randn(6, D, seed=k))
        right = solver.solve(keys.requires_grad_())
        assert right.dtype == torch.float32
        assert not right.requires_grad
        assert_solved(right, published.solve(keys.detach()), 2e-5)
        solver.commit(None if k % 2 else keys)
        published.commit(keys.detach())
        storage = storage.detach()
    torch.testing.assert_close(
        RecursiveLeastSquares(2.0, D, form=form).solve(keys.detach()), Published(2.0, D).solve(keys.detach()).float()
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_repeated_keys(form, dtype):
    solver, published = RecursiveLeastSquares(1.0, D, form=form, dtype=dtype), Published(1.0, D)
    once = randn(3, D, dtype=dtype)
    keys = torch.cat([once, once, once[:1]])  # within a batch as well
    # H is 1 / ridge less nearly as much along the keys: what it rounds to is absolute.
    allowed = 4 * torch.finfo(dtype).eps * float(keys.norm(dim=1).max())
    for _ in range(40):
        torch.testing.assert_close(solver.solve(keys).double(), published.solve(keys), rtol=0, atol=allowed)
        solver.commit()
        published.commit(keys)
    fresh = randn(3, D, dtype=dtype, seed=5)
    assert_solved(solver.solve(fresh), published.solve(fresh), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from(FORMS),
    st.lists(st.tuples(st.sampled_from(("one", "two", "rollback", "reload")), st.integers(0, 5)), max_size=8),
)
def test_any_order(d, m, form, steps):
    space = None if m > d else null_space(m, d)
    made = lambda: RecursiveLeastSquares(0.7, d, space, form=form, dtype=torch.float64)  # noqa: E731
    solver, published = made(), Published(0.7, d, space)
    for k, (step, b) in enumerate(steps):
        keys, again = randn(b, d, seed=k), randn(b + 1, d, seed=-k)
        if step == "reload":
            saved, solver = bits(solver), made()
            solver.load_state_dict(saved)
        assert_solved(solver.solve(keys), published.solve(keys), 1e-10)
        if step == "rollback":
            solver.rollback()
        elif step == "two":
            solver.commit(again)
            published.commit(again)
        else:
            solver.commit()
            published.commit(keys)
    keys = randn(2, d, seed=77)
    assert_solved(solver.solve(keys), published.solve(keys), 1e-10)


def stream(d, b, number):
    """Keys of a decaying spectrum and a common part, the same batches again and again."""
    scale = 1 / (1 + 20 * torch.arange(d) / d)
    return (randn(b, d, seed=number % 8) * scale + 0.2 * randn(1, d, seed=50)).float()


@pytest.mark.parametrize("form", ("dual", "full"))
@pytest.mark.parametrize(("m", "two_keys"), [(60, False), (80, True), (None, True)])
def test_two_hundred_batches_in_fp32(form, m, two_keys):
    d, b, space, worst = 96, 20, null_space(m, 96), 0.0
    solver, published = RecursiveLeastSquares(10.0, d, space, form=form), Published(10.0, d, space)
    for number in range(200):
        keys = stream(d, b, number)
        right = solver.solve(keys)
        if number % 20 == 19 or number < 2:
            expected = published.solve(keys)
            worst = max(worst, float((right - expected).norm() / expected.norm()))
        again = 1.01 * keys if two_keys else None
        solver.commit(again)
        published.commit(keys if again is None else again)
    print(f"{form}, {m} of {d}: {worst:.1e}")
    assert solver.edits == 4000
    assert worst <= 1e-4


@pytest.mark.parametrize("m", (None, 9, 20))
@pytest.mark.parametrize("form", FORMS)
def test_a_solve_changes_nothing_until_it_is_committed(form, m):
    solver = RecursiveLeastSquares(2.0, D, null_space(m), form=form)
    for k in range(4):
        solver.solve(randn(3, D, seed=k))
        solver.commit()
    keys, before = randn(5, D, seed=50), bits(solver)
    right = solver.solve(keys)
    assert_same_bits(bits(solver), before)
    for other in range(3):
        solver.solve(randn(7, D, seed=60 + other))
    solver.rollback()
    assert_same_bits(bits(solver), before)
    with pytest.raises(ValueError, match="commit without keys must follow a solve"):
        solver.commit()
    assert torch.equal(solver.solve(keys), right)
    solver.rollback()
    solver.rollback()
    assert_same_bits(bits(solver), before)
    assert solver.edits == 12


@pytest.mark.parametrize("form", FORMS)
def test_commit(form):
    keys, others = randn(3, D), randn(4, D, seed=1)
    solved = RecursiveLeastSquares(2.0, D, form=form)
    with pytest.raises(ValueError, match="commit without keys must follow a solve"):
        solved.commit()
    solved.solve(others)
    solved.solve(keys)  # the last one counts
    solved.commit()
    with pytest.raises(ValueError, match="commit without keys must follow a solve"):
        solved.commit()
    given = RecursiveLeastSquares(2.0, D, form=form)
    given.commit(keys)  # without a solve
    assert_same_bits(bits(solved), bits(given))
    solved.solve(others)
    solved.commit(keys)  # the keys solved for are not history
    given.commit(keys)
    assert_same_bits(bits(solved), bits(given))
    with pytest.raises(ValueError, match="commit without keys must follow a solve"):
        solved.commit()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m", (None, 9, 20))
@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_history_goes_on_bit_for_bit(form, m, dtype):
    def made():
        return RecursiveLeastSquares(2.0, D, null_space(m), form=form, dtype=dtype)

    def batch(solver, k):
        found = solver.solve(randn(2, D, seed=k))
        solver.commit(randn(2, D, seed=k + 50) if k % 2 else None)
        return found

    solver, kept, rights = made(), [], []
    for k in range(14):
        kept.append(bits(solver))
        rights.append(batch(solver, k))
    final = bits(solver)
    forms = {"dual" if "dual" in saved else "full" for saved in kept}
    assert forms == ({"dual", "full"} if form == "auto" else {form})
    for start, saved in enumerate(kept):
        other = made()
        batch(other, 99)  # what it knew must be gone
        other.solve(randn(2, D, seed=98))
        other.load_state_dict(saved)
        with pytest.raises(ValueError, match="commit without keys must follow a solve"):
            other.commit()
        assert other.edits == 2 * start
        for k in range(start, 14):
            assert torch.equal(batch(other, k), rights[k])
        assert_same_bits(bits(other), final)
    other.load_state_dict(solver.state_dict())
    batch(other, 77)
    assert_same_bits(bits(solver), final)  # nothing is shared


def memit(moment, weight, keys):
    keys = keys.double().T
    return torch.linalg.solve(weight * moment.double() + keys @ keys.T, keys).T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", (1e-3, 1.0, 15000.0))
def test_memit(weight, dtype):
    for moment in (covariance(D), covariance(D).float()):
        solver = FactoredCovariance(moment, weight)
        for k, b in enumerate((0, 1, 5, 60)):
            keys = randn(D, b, dtype=dtype, seed=k).T
            right = solver.solve(keys.requires_grad_())
            assert right.dtype == torch.float64
            assert right.shape == (b, D)
            assert not right.requires_grad
            assert_solved(right, memit(moment, weight, keys.detach()), 1e-7 if weight < 1 else 1e-10)
            assert torch.equal(solver.solve(keys), right)  # nothing is remembered
        twice = randn(2, D, dtype=dtype, seed=5).repeat(3, 1)
        assert_solved(solver.solve(twice), memit(moment, weight, twice), 1e-7 if weight < 1 else 1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.floats(1e-2, 1e5))
def test_any_memit(d, b, weight):
    keys = randn(b, d, seed=b)
    assert_solved(FactoredCovariance(covariance(d), weight).solve(keys), memit(covariance(d), weight, keys), 1e-8)


def test_the_covariance_is_not_changed():
    moment = covariance(D)
    before = moment.clone()
    solver, keys = FactoredCovariance(moment, 3.0), randn(4, D)
    right = solver.solve(keys)
    assert torch.equal(moment, before)
    moment.zero_()
    assert torch.equal(solver.solve(keys), right)


def test_the_solvers_agree():
    """The whitened covariance as history: both are the same formula."""
    lower = torch.linalg.cholesky(covariance(D))
    history, keys = lower.T, randn(5, D)
    solver = RecursiveLeastSquares(1e-9, D, dtype=torch.float64)
    for rows in history.split(6):
        solver.commit(rows)
    assert_solved(solver.solve(keys), FactoredCovariance(covariance(D), 1.0).solve(keys), 1e-4)
