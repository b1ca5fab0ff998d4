"""Sparse projection by the native kernels of every instruction set, against fp64: one rounding at the end."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from calls import DIMS, ROWS, around, layouts
from cases import DTYPES, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphere_kernels import LowRankUpdate, apply_projected_update_, sparse_projection

project = functools.partial(sparse_projection, impl="native")
apply_ = functools.partial(apply_projected_update_, impl="native")


def basis_of(d, r, *leading, dtype=torch.float64):
    return torch.linalg.qr(randn(*leading, d, r, seed=5)).Q.to(dtype)


def exact(update, basis, alpha):
    update, basis = update.double(), basis.double()
    return update - alpha * (update @ basis) @ basis.mT


def assert_rounded_once(actual, expected, slack, message=""):
    """Within half a unit in the last place of the fp64 result, and what the sums in the wide dtype may err."""
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(expected).exponent - 1
    unit = (info.eps * torch.exp2(exponent.double())).clamp(min=info.tiny * info.eps)
    error = (actual.double() - expected).abs()
    assert (error <= 0.5001 * unit + slack).all(), (message, (error - 0.5 * unit).max(), slack)


def slack_of(*tensors, depth):
    """A few roundings of the wide dtype at the size of the terms, random along the depth."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    size = torch.stack([t.double().abs().max() if t.numel() else torch.zeros((), dtype=torch.float64) for t in tensors])
    return torch.finfo(wide).eps * size.clamp(min=1).prod() * (4 + depth**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(tier, dtype):
    shapes = [
        *((20, d, (d + 2) // 3) for d in DIMS),
        *((n, 17, 5) for n in ROWS),
        *((9, 70, r) for r in (0, 1, 48, 49, 70)),
    ]
    for n, d, r in shapes:
        update, basis = randn(n, d, dtype=dtype), basis_of(d, r, dtype=dtype)
        actual = project(update, basis, 0.7)
        assert actual.dtype == dtype
        assert_rounded_once(actual, exact(update, basis, 0.7), slack_of(update, basis, depth=d), (n, d, r))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(tier, weight_dtype):
    for mix in itertools.product(DTYPES, repeat=3):
        left, right, basis = (
            t.to(dtype) for t, dtype in zip((randn(13, 3), randn(3, 19, seed=1), basis_of(19, 7)), mix, strict=True)
        )
        weight = randn(13, 19, dtype=weight_dtype, seed=9)
        slack = slack_of(weight, left, right, basis, depth=19)
        expected = weight.double() + left.double() @ exact(right, basis, 0.3)
        actual = apply_(weight.clone(), LowRankUpdate(left, right), basis, 0.3)
        assert_rounded_once(actual, expected, 3 * slack, mix)
        update = randn(13, 19, dtype=mix[0], seed=2)
        expected = weight.double() + exact(update, basis, 0.3)
        assert_rounded_once(
            apply_(weight.clone(), update, basis, 0.3), expected, slack_of(weight, update, basis, depth=19), mix
        )
        actual = project(update, basis, 0.3)
        assert actual.dtype == update.dtype
        assert_rounded_once(actual, exact(update, basis, 0.3), slack_of(update, basis, depth=19), mix)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("n", "d", "r", "b"), [(200, 1500, 100, 5), (700, 30, 10, 300), (3, 14336, 40, 2), (400, 14000, 3, 200)]
)
def test_larger_than_tiles_and_chunks(tier, dtype, n, d, r, b):
    left, right, weight = randn(n, b, dtype=dtype), randn(b, d, dtype=dtype, seed=1), randn(n, d, dtype=dtype, seed=2)
    basis = basis_of(d, r, dtype=dtype)
    projected = exact(right, basis, 0.5)
    actual = apply_(weight.clone(), LowRankUpdate(left, right), basis)
    slack = torch.finfo(torch.float32).eps * 8 * (4 + b**0.5) * 4
    assert_rounded_once(actual, weight.double() + left.double() @ projected, slack)
    assert_rounded_once(project(right, basis), projected, torch.finfo(torch.float32).eps * 4 * (8 + r**0.5))


def test_a_deep_product(tier):  # more than 10 MB of packed rows: three chunks of each operand
    update, basis = randn(1, 30000, dtype=torch.float32).expand(400, 30000), basis_of(30000, 2, dtype=torch.float32)
    actual = project(update, basis, 1.0)
    torch.testing.assert_close(actual.double(), exact(update, basis, 1.0), rtol=0, atol=1e-5)
    assert torch.equal(actual, actual[:1].expand(400, 30000))


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(tier, dtype, shared):
    start, update = randn(3, 37, 19, dtype=dtype), randn(3, 37, 19, dtype=dtype, seed=1)
    factors = LowRankUpdate(randn(3, 37, 4, dtype=dtype, seed=2), randn(3, 4, 19, dtype=dtype, seed=3))
    basis = basis_of(19, 7, *([] if shared else [3]), dtype=dtype)
    expected = [project(update, basis), apply_(start.clone(), update, basis), apply_(start.clone(), factors, basis)]
    for name, _, view in layouts(update):
        assert torch.equal(project(view, basis), expected[0]), name
        assert project(view, basis).is_contiguous()
        assert torch.equal(apply_(start.clone(), view, basis), expected[1]), name
    for (name, _, left), (_, _, right) in zip(layouts(factors.left), layouts(factors.right), strict=True):
        assert torch.equal(apply_(start.clone(), LowRankUpdate(left, right), basis), expected[2]), name
    for name, _, view in layouts(basis if not shared else basis[None]):
        view = view[0] if shared else view
        assert torch.equal(project(update, view), expected[0]), name
        assert torch.equal(apply_(start.clone(), factors, view), expected[2]), name
    for which, factor in ((1, update), (2, factors)):
        for name, storage, view in layouts(start):
            if name == "negative bit":
                continue  # see test_native_gram
            assert apply_(view, factor, basis) is view
            assert torch.equal(view, expected[which]), name
            view.fill_(float("nan"))
            assert storage.isnan().all(), f"{name}: written outside"


def test_leading_dimensions_that_do_not_merge(tier):
    for leading in ((2, 3), (1, 2, 2)):
        start, update = randn(*leading, 9, 7), randn(*leading, 9, 7, seed=1)
        basis = basis_of(7, 3, *leading)
        storage, view = around(start.transpose(0, 1), *[1] * (start.ndim - 2), 2, 3)
        view = view.transpose(0, 1)
        view.copy_(start)
        expected = start + exact(update, basis, 0.5)
        torch.testing.assert_close(apply_(view, update.transpose(0, 1).contiguous().transpose(0, 1), basis), expected)
        view.fill_(float("nan"))
        assert storage.isnan().all()


def test_broadcast_updates(tier):
    weight, basis = randn(4, 9, 7), basis_of(7, 3)
    for update in (randn(9, 7).expand(4, 9, 7), randn(1, 7).expand(4, 9, 7), randn(4, 9, 1).expand(4, 9, 7)):
        torch.testing.assert_close(apply_(weight.clone(), update, basis), weight + exact(update, basis, 0.5))
    left, right = randn(9, 1).expand(4, 9, 3), randn(1, 7).expand(4, 3, 7)
    expected = weight + left @ exact(right, basis, 0.5)
    torch.testing.assert_close(apply_(weight.clone(), LowRankUpdate(left, right), basis), expected)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_stays_where_it_is(tier, dtype, bad):
    for r in (0, 5):
        update, basis = randn(120, 19, dtype=dtype), basis_of(19, r, dtype=dtype)
        update[[4, 119], [3, 18]] = bad
        left, right = randn(120, 3, dtype=dtype), randn(3, 19, dtype=dtype)
        left[7, 1] = bad
        results = []
        for impl in ("reference", "native"):
            options = {"alpha": 0.5, "impl": impl}
            results.append(
                [
                    sparse_projection(update, basis, **options),
                    apply_projected_update_(randn(120, 19, dtype=dtype), update, basis, **options),
                    apply_projected_update_(randn(120, 19, dtype=dtype), LowRankUpdate(left, right), basis, **options),
                ]
            )
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())
            assert expected.isfinite().any()


@pytest.mark.parametrize(("leading", "n", "b", "d", "r"), [
    ((), 0, 2, 5, 2), ((), 4, 0, 5, 2), ((), 4, 2, 0, 0), ((), 4, 2, 5, 0), ((0,), 4, 2, 5, 2), ((2, 0), 4, 2, 5, 2),
    ((2,), 0, 0, 0, 0), ((), 1, 1, 1, 1),
])  # fmt: skip
def test_empty(tier, leading, n, b, d, r):
    for dtype in DTYPES:
        weight, left = randn(*leading, n, d, dtype=dtype), randn(*leading, n, b, dtype=dtype)
        right, basis = randn(*leading, b, d, dtype=dtype), randn(d, r, dtype=dtype)
        for update in (LowRankUpdate(left, right), LowRankUpdate(left, right).dense()):
            results = [apply_projected_update_(weight.clone(), update, basis, impl=i) for i in ("reference", "native")]
            torch.testing.assert_close(*results)
        torch.testing.assert_close(project(right, basis), sparse_projection(right, basis, impl="reference"))


def test_alpha(tier):
    update, basis = randn(40, 30), basis_of(30, 7)
    assert torch.equal(project(update, basis, 0.0), update)
    assert (project(update, basis, 1.0) @ basis).abs().max() < 1e-14


def test_gradcheck(tier):
    basis, update = basis_of(5, 2), randn(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: project(u, basis, 0.7), (update,))
    assert torch.autograd.gradgradcheck(lambda u: project(u, basis, 0.7).pow(3), (update,))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 60),
    st.integers(0, 9),
    st.integers(1, 60),
    st.data(),
    st.floats(0, 1),
    st.tuples(*[st.sampled_from(DTYPES)] * 4),
    st.booleans(),
)
def test_any_shape(tier, leading, n, b, d, data, alpha, dtypes, shared):
    basis = basis_of(d, data.draw(st.integers(0, d)), *([] if shared else leading), dtype=dtypes[0])
    left, right = randn(*leading, n, b, dtype=dtypes[1]), randn(*leading, b, d, dtype=dtypes[2], seed=1)
    weight = randn(*leading, n, d, dtype=dtypes[3], seed=2)
    expected = weight.double() + left.double() @ exact(right, basis, alpha)
    actual = apply_(weight.clone(), LowRankUpdate(left, right), basis, alpha)
    assert_rounded_once(actual, expected, 3 * slack_of(weight, left, right, basis, depth=d))
