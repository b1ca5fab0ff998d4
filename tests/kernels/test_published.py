"""The published signature against the published formula, written densely."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, randn

from sphere_kernels.published import SoftProjector, sparse_projection

pytestmark = pytest.mark.usefixtures("each_impl")


def dense(a, b, eta, alpha):
    """All of it with the d×d matrices written out, in fp64."""
    a = a.double()
    unit = a / (a.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(a))
    share = values.flip(0).cumsum(0) / values.sum()
    rank = int((share <= eta).sum()) + 1
    u = vectors[:, -rank:]
    projector = torch.eye(a.shape[1], dtype=a.dtype) - alpha * u @ u.T
    return b.double() @ projector, projector, u


@pytest.mark.parametrize("alpha", (0.5, 0.8, 1.0))
@pytest.mark.parametrize("eta", (0.0, 0.3, 0.5, 0.9))
@pytest.mark.parametrize(("n", "d"), ((12, 40), (40, 12), (17, 17), (1, 5), (6, 1)))
def test_is_the_published_function(n, d, eta, alpha):
    a, b = randn(n, d) * torch.logspace(0, 1, d), randn(n, d, seed=1)
    want, projector, u = dense(a, b, eta, alpha)
    found, soft, directions = sparse_projection(a, b, eta, alpha)  # unpacks as it is unpacked there
    torch.testing.assert_close(found, want, atol=1e-10, rtol=1e-10)
    assert directions.shape == u.shape
    torch.testing.assert_close(directions @ directions.T, u @ u.T, atol=1e-10, rtol=0)
    ratios = [float((a / a.norm(dim=1, keepdim=True) @ directions[:, i]).norm()) for i in range(u.shape[1])]
    assert ratios == sorted(ratios)  # ascending, as eigh has them
    assert soft.shape == projector.shape and isinstance(soft.T, SoftProjector)
    for one, other in ((soft.dense(), projector), (b @ soft.T, want), (soft @ b.T, want.T)):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_keywords_and_defaults_are_the_published_ones():
    a, b = randn(9, 20), randn(9, 20, seed=1)
    torch.testing.assert_close(sparse_projection(a, b).B_proj, dense(a, b, 0.5, 0.5)[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(sparse_projection(A=a, B=b, eta=0.2, alpha=1).B_proj, dense(a, b, 0.2, 1)[0])


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_keeps_its_dtype(dtype, other):
    a, b = (randn(12, 40) * torch.logspace(0, 1, 40)).to(dtype), randn(12, 40, seed=1, dtype=other)
    before = a.clone(), b.clone()
    found = sparse_projection(a, b, 0.5, 0.8)
    eps = max(torch.finfo(other).eps, 1e-5 if dtype != torch.float64 else 0)
    assert found.B_proj.dtype == other and found.B_proj.device == b.device
    assert found.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.B_proj.double(), dense(a, b, 0.5, 0.8)[0], atol=16 * eps, rtol=4 * eps)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_a_transposed_weight_and_a_parameter():
    """As a Conv1D weight's neurons are given, and as a model's weight is."""
    stored, update = torch.nn.Parameter(randn(40, 12)), randn(40, 12, seed=1)
    found = sparse_projection(stored.T, update.T, 0.5, 0.8).B_proj.T
    torch.testing.assert_close(found, dense(stored.detach().T, update.T, 0.5, 0.8)[0].T, atol=1e-10, rtol=0)
    assert not found.requires_grad
    assert not torch.allclose(found, sparse_projection(stored, update, 0.5, 0.8).B_proj)


def test_nothing_is_as_large_as_the_square_of_the_columns(largest_tensor, monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_IMPL", "reference")  # the others' work is not seen
    a, b = randn(6, 300), randn(6, 300, seed=1)
    with largest_tensor:
        found = sparse_projection(a, b)
        b @ found.P_soft
    assert largest_tensor.elements < 300 * 300 / 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"A": torch.ones(4, 6)}, ValueError, r"B an update with its d columns, got shapes \[4, 6\] and \[4, 5\]"),
        ({"A": torch.ones(2, 4, 5)}, ValueError, r"A must be a weight \[n, d\] .* got shapes \[2, 4, 5\] and \[4, 5\]"),
        ({"B": torch.ones(5)}, ValueError, r"B must have at least 2 dimensions .* got shape \[5\]"),
        ({"B": torch.ones(4, 5, device="meta")}, ValueError, "B must be on the device of A, cpu, got meta"),
        ({"A": torch.ones(4, 5, dtype=torch.int32)}, TypeError, "A must be float64, .* got torch.int32"),
        ({"A": None}, TypeError, "A must be a tensor, got NoneType"),
        ({"A": torch.zeros(4, 5)}, ValueError, "non-zero row"),
        ({"A": torch.full((4, 5), float("nan"))}, ValueError, "must be finite"),
        ({"eta": 1.2}, ValueError, "eta must be between 0 and 1, got 1.2"),
        ({"alpha": -0.1}, ValueError, "alpha must be between 0 and 1, got -0.1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sparse_projection(**{"A": torch.ones(4, 5), "B": torch.ones(4, 5), **arguments})
