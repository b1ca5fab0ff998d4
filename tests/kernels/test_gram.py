"""Gram matrices against the products in fp64."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import DTYPES, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_kernels import gram

pytestmark = pytest.mark.usefixtures("each_impl")


def exact(weight, normalize):
    rows = oracle.unit_rows(weight.double()) if normalize else weight.double()
    return rows @ rows.mT


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("n", (1, 6, 7, 8, 29))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, n, normalize, small_tiles):
    weight = randn(3, n, 33, dtype=dtype)
    expected, actual = exact(weight, normalize), gram(weight, normalize=normalize)
    rows = oracle.unit_rows(weight) if normalize else weight
    plain, eps = (rows @ rows.mT).double(), torch.finfo(dtype).eps
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.is_contiguous()
    assert torch.equal(actual, actual.mT)
    error = (actual - expected).abs().max()
    if dtype != torch.float64:  # there plain torch is the oracle
        assert error <= 2 * ((plain - expected).abs().max() + eps * expected.abs().max())
    # Low precision goes through fp32 arithmetic, so it is far better than its budget.
    assert error <= 5 * torch.finfo(actual.dtype).eps * expected.abs().max()


def test_symmetric_across_real_tiles():
    weight = randn(600, 70, dtype=torch.float32)
    actual = gram(weight)
    assert torch.equal(actual, actual.mT)
    torch.testing.assert_close(actual.double(), exact(weight, False), rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 9), st.integers(0, 5), st.booleans())
def test_any_shape(leading, n, d, normalize):
    weight = randn(*leading, n, d)
    actual = gram(weight, normalize=normalize)
    assert actual.shape == (*leading, n, n)
    torch.testing.assert_close(actual, exact(weight, normalize), rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalize", (False, True))
def test_strides(normalize):
    weight = randn(20, 15)
    storage = torch.full((40, 30), float("nan"), dtype=torch.float64)
    storage[::2, ::2] = weight
    for view in (weight.T.contiguous().T, storage[::2, ::2], weight.expand(3, 20, 15)):
        actual = gram(view, normalize=normalize)
        torch.testing.assert_close(actual, exact(view, normalize), rtol=0, atol=1e-13)
    stacked = randn(4, 3, 5, 6).transpose(0, 1)
    torch.testing.assert_close(gram(stacked, normalize=normalize), exact(stacked, normalize), rtol=0, atol=1e-13)


def test_zero_rows_stay_zero():
    weight = randn(5, 4)
    weight[2] = 0
    for normalize in (False, True):
        actual = gram(weight, normalize=normalize)
        assert actual[2].abs().max() == 0
        assert actual[:2, :2].abs().min() > 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_not_finite_spoils_its_own_row_only(bad, small_tiles):
    weight = randn(9, 4)
    weight[3, 1] = bad
    rest = [i for i in range(9) if i != 3]
    for normalize in (False, True):
        actual = gram(weight, normalize=normalize)
        spoilt = actual.isnan() if normalize or bad != bad else ~actual.isfinite()
        assert spoilt[3].all()
        assert spoilt[:, 3].all()
        torch.testing.assert_close(actual[rest][:, rest], exact(weight[rest], normalize), rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalize", (False, True))
def test_gradient(normalize, small_tiles):
    weight, upstream = randn(2, 8, 4), randn(2, 8, 8, seed=1)
    leaf = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gram(w, normalize=normalize), (leaf,))
    assert torch.autograd.gradgradcheck(lambda w: gram(w, normalize=normalize).square(), (leaf,))
    for dtype in DTYPES:
        low, wide = (weight.to(dtype).to(kind).clone().requires_grad_() for kind in (dtype, torch.float64))
        (gram(low, normalize=normalize) * upstream).sum().backward()
        (exact(wide, normalize) * upstream).sum().backward()
        tolerance = 8 * torch.finfo(dtype).eps * wide.grad.abs().max().item()
        assert low.grad.dtype == dtype
        torch.testing.assert_close(low.grad.double(), wide.grad, rtol=0, atol=tolerance)


def test_gradient_of_a_zero_row():
    weight = randn(5, 4)
    weight[2] = 0
    leaf = weight.requires_grad_()
    (gram(leaf, normalize=True) * randn(5, 5)).sum().backward()
    assert leaf.grad[2].abs().max() == 0
    assert leaf.grad[[0, 1, 3, 4]].abs().min() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have at least 2 dimensions .* got shape \[3\]"),
        ({"weight": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "weight must be float64, .* got torch.int64"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, native, triton, cuda, got 'fast'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        gram(**({"weight": torch.ones(3, 3)} | options))
