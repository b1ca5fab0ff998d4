"""Sparse projection against the explicit projector in fp64."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_kernels import LowRankUpdate, apply_projected_update_, principal_directions, sparse_projection
from sphere_kernels.projection import reference

pytestmark = pytest.mark.usefixtures("each_impl")

LOW = (torch.bfloat16, torch.float16)


def basis_of(d, r, *leading, dtype=torch.float64):
    return torch.linalg.qr(randn(*leading, d, r, seed=5)).Q.to(dtype)


def explicit(update, basis, alpha):
    """``update (I - alpha U U^T)`` with the d x d matrix written out, in fp64."""
    basis = basis.double()
    return update.double() @ (torch.eye(basis.shape[-2], dtype=torch.float64) - alpha * basis @ basis.mT)


def tolerance(dtype):
    return 8 * torch.finfo(dtype).eps


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 6),
    st.integers(1, 6),
    st.data(),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_dense_against_the_explicit_projector(leading, n, d, data, alpha, dtype, shared):
    basis = basis_of(d, data.draw(st.integers(0, d)), *([] if shared else leading), dtype=dtype)
    update = randn(*leading, n, d, dtype=dtype)
    before = update.clone()
    actual = sparse_projection(update, basis, alpha)
    assert actual.dtype == dtype
    assert actual.shape == update.shape
    assert actual.untyped_storage().data_ptr() != update.untyped_storage().data_ptr() or update.numel() == 0
    assert torch.equal(update, before)
    torch.testing.assert_close(
        actual.double(), explicit(update, basis, alpha), rtol=tolerance(dtype), atol=4 * tolerance(dtype)
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=1), st.integers(1, 6), st.integers(1, 3), st.integers(1, 6))
def test_low_rank_against_dense(leading, n, b, d):
    update = LowRankUpdate(randn(*leading, n, b), randn(*leading, b, d, seed=1))
    basis = basis_of(d, (d + 1) // 2)
    actual = sparse_projection(update, basis, 0.8)
    assert isinstance(actual, LowRankUpdate)
    assert actual.left is update.left
    assert actual.shape == update.shape == update.dense().shape
    torch.testing.assert_close(actual.dense(), sparse_projection(update.dense(), basis, 0.8))


def test_what_alpha_means():
    weight = randn(12, 9)
    directions = principal_directions(weight, 0.5)
    update = randn(7, 9, seed=3)
    torch.testing.assert_close(sparse_projection(update, directions, 0.0), update)
    inside, removed = update @ directions.basis, sparse_projection(update, directions, 1.0)
    assert (removed @ directions.basis).abs().max() < 1e-14
    torch.testing.assert_close(sparse_projection(update, directions) @ directions.basis, 0.5 * inside)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_rounds_once(dtype):
    update, basis = randn(40, 30, dtype=dtype), basis_of(30, 7, dtype=torch.float32)
    wide = update.float() - 0.3 * ((update.float() @ basis) @ basis.T)
    assert torch.equal(sparse_projection(update, basis, 0.3), wide.to(dtype))
    weight = randn(40, 30, dtype=dtype, seed=9)
    expected = (weight.float() + wide).to(dtype)
    assert torch.equal(apply_projected_update_(weight.clone(), update, basis, 0.3), expected)
    assert not torch.equal(expected, weight + wide.to(dtype))


def test_low_rank_in_place_rounds_once():
    left, right, basis = randn(40, 3, dtype=torch.bfloat16), randn(3, 30, dtype=torch.float32), basis_of(30, 7).float()
    weight = randn(40, 30, dtype=torch.bfloat16, seed=9)
    projected = right - 0.3 * ((right @ basis) @ basis.T)
    expected = (weight.float() + left.float() @ projected).to(torch.bfloat16)
    assert torch.equal(apply_projected_update_(weight.clone(), LowRankUpdate(left, right), basis, 0.3), expected)


def test_computes_in_the_wider_dtype():
    update, basis = randn(6, 5), basis_of(5, 2)
    exact = explicit(update.float(), basis, 0.5)
    torch.testing.assert_close(sparse_projection(update.float(), basis), exact.float(), rtol=1e-7, atol=6e-8)
    wide = sparse_projection(update, basis.float())
    torch.testing.assert_close(wide, explicit(update, basis.float(), 0.5), rtol=1e-14, atol=1e-14)
    weight = randn(6, 5, seed=4)
    expected = weight + explicit(update.float(), basis.float(), 0.5)
    actual = apply_projected_update_(weight.clone(), update.float(), basis.float())
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("make", (basis_of, lambda d, r, *leading: basis_of(d, r)), ids=("batched", "shared"))
def test_gradient(make):
    basis = make(5, 2, 3)
    assert torch.autograd.gradcheck(lambda u: sparse_projection(u, basis, 0.7), (randn(3, 4, 5).requires_grad_(),))
    assert torch.autograd.gradgradcheck(
        lambda u: sparse_projection(u, basis, 0.7).pow(3), (randn(3, 4, 5).requires_grad_(),)
    )


def test_gradient_through_factors():
    left, right = randn(4, 2).requires_grad_(), randn(2, 5, seed=1).requires_grad_()
    basis = basis_of(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: sparse_projection(LowRankUpdate(a, b), basis, 0.7).dense(), (left, right)
    )
    sparse_projection(right, basis).sum().backward()
    assert basis.grad is None


@pytest.mark.parametrize("low_rank", (False, True))
@pytest.mark.parametrize("chunk", (1, 30, 1 << 20))
def test_in_place(low_rank, chunk, monkeypatch):
    monkeypatch.setattr("sphere_kernels._common.rows.CHUNK_ELEMENTS", chunk)
    factors = LowRankUpdate(randn(2, 9, 3), randn(2, 3, 7, seed=1))
    basis = basis_of(7, 3, 2)
    storage = torch.full((2, 14, 18), float("nan"), dtype=torch.float64)
    layouts = {
        "contiguous": torch.empty(2, 9, 7, dtype=torch.float64),
        "transposed": torch.empty(2, 7, 9, dtype=torch.float64).mT,
        "strided": storage[:, ::2, ::2].mT,
        "parameter": torch.nn.Parameter(torch.empty(2, 9, 7, dtype=torch.float64)),
    }
    start = randn(2, 9, 7, seed=6)
    expected = start + explicit(factors.dense(), basis, 0.5)
    for name, weight in layouts.items():
        weight.data.copy_(start)
        update = factors if low_rank else factors.dense()
        assert apply_projected_update_(weight, update, basis) is weight, name
        torch.testing.assert_close(weight.detach(), expected, msg=name)
        assert weight.grad_fn is None
    untouched = torch.ones(14, 18, dtype=torch.bool)
    untouched[::2, ::2] = False
    assert storage[:, untouched].isnan().all()


def test_in_place_counts_as_a_change_for_autograd():
    weight = torch.nn.Parameter(randn(4, 5))
    loss = weight.square().sum()
    apply_projected_update_(weight, randn(4, 5), basis_of(5, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_of_a_low_rank_update(largest_tensor, monkeypatch):
    monkeypatch.setattr("sphere_kernels._common.rows.CHUNK_ELEMENTS", 1200)
    weight, update, basis = randn(40, 300), LowRankUpdate(randn(40, 2), randn(2, 300)), basis_of(300, 3)
    with largest_tensor:
        sparse_projection(update, basis)
    assert largest_tensor.elements == 3 * 300  # the basis; neither n x d nor d x d
    largest_tensor.elements = 0
    with largest_tensor:
        reference.apply_projected_update_(weight, update.left, update.right, basis, 0.5)
    assert largest_tensor.elements == 1200


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.01}, ValueError, "alpha must be between 0 and 1, got 1.01"),
        ({"alpha": -0.1}, ValueError, "alpha must be between 0 and 1, got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be between 0 and 1, got nan"),
        ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
        ({"directions": torch.ones(4, 2)}, ValueError, r"directions must have 5 rows, .* got shape \[4, 2\]"),
        ({"directions": torch.ones(2, 5, 2)}, ValueError, r"leading dimensions \[\] of update, got shape \[2, 5, 2\]"),
        ({"directions": torch.ones(5)}, ValueError, r"directions must have at least 2 .* got shape \[5\]"),
        ({"directions": None}, TypeError, "directions must be a tensor, got NoneType"),
        ({"directions": torch.ones(5, 2, device="meta")}, ValueError, "device of update, cpu, got meta"),
        ({"update": torch.ones(4, 5, dtype=torch.int32)}, TypeError, "update must be float64, .* got torch.int32"),
        ({"update": torch.ones(3, 5)}, ValueError, r"shape of weight, \[4, 5\], got \[3, 5\]"),
        ({"update": torch.ones(1, 5)}, ValueError, r"shape of weight, \[4, 5\], got \[1, 5\]"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is not available for"),
        ({"impl": "gpu"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    weight = torch.ones(4, 5)
    arguments = {"update": torch.ones(4, 5), "directions": torch.ones(5, 2), "alpha": 0.5} | options
    with pytest.raises(error, match=message):
        apply_projected_update_(weight, **arguments)
    assert torch.equal(weight, torch.ones(4, 5))
    if "weight" not in message:
        with pytest.raises(error, match=message):
            sparse_projection(**arguments)


def test_weight_must_own_its_elements():
    with pytest.raises(ValueError, match="weight must own each of its elements"):
        apply_projected_update_(torch.ones(1, 5).expand(4, 5), torch.ones(4, 5), torch.ones(5, 2))
    with pytest.raises(TypeError, match="weight must be float64, .* got torch.int64"):
        apply_projected_update_(torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 5), torch.ones(5, 2))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (torch.ones(4, 2), torch.ones(3, 5), r"right must have shape \[2, 'd'\] .* got \[3, 5\]"),
        (torch.ones(2, 4, 2), torch.ones(2, 5), r"right must have shape \[2, 2, 'd'\] .* got \[2, 5\]"),
        (torch.ones(4), torch.ones(3, 5), r"left must have at least 2 dimensions"),
        (torch.ones(4, 2), torch.ones(2, 5, device="meta"), "right must be on the device of left, cpu, got meta"),
    ],
)
def test_factors_must_fit(left, right, message):
    with pytest.raises(ValueError, match=message):
        LowRankUpdate(left, right)


def test_overlapping_weight_is_refused():
    weight = torch.randn(20).as_strided((6, 8), (2, 1))
    with pytest.raises(ValueError, match="own each of its elements"):
        apply_projected_update_(weight, torch.randn(6, 8), torch.zeros(8, 0))
