"""The subspace iteration: from a start or from nothing, against eigh, and against its own certificate in fp64."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import randn
from test_directions import decaying, projector

from sphere_kernels import principal_directions
from sphere_kernels.directions import subspace

pytestmark = pytest.mark.usefixtures("each_impl")

# A start that says nothing, or the wrong thing, for a basis [d, r] of the truth.
BAD_STARTS = {
    "random": lambda truth: randn(*truth.shape, seed=7),
    "zero": torch.zeros_like,
    "zero columns among good ones": lambda truth: truth * (torch.arange(truth.shape[1]) % 2),
    "one direction many times": lambda truth: truth[:, :1].expand(truth.shape),
    "orthogonal to the truth": lambda truth: (
        torch.linalg.qr(randn(*truth.shape) - projector(truth) @ randn(*truth.shape)).Q
    ),
    "not normalised": lambda truth: truth * 10.0 ** torch.arange(-30, truth.shape[1] - 30),
    "huge": lambda truth: 1e300 * truth,
    "one column": lambda truth: truth[:, :1],
    "no column": lambda truth: truth[:, :0],
    "more than there are": lambda truth: randn(truth.shape[0], truth.shape[0] + 9),
}


def spiked(n, d, strong, seed=0):
    """Noise and ``strong`` directions that stand out of it."""
    return randn(n, d, seed=seed) + 3 * randn(n, strong, seed=seed + 1) @ randn(strong, d, seed=seed + 2)


def edited(weight, rank=3, size=1e-2):
    update = randn(weight.shape[0], rank, seed=8) @ randn(rank, weight.shape[1], seed=9)
    return weight + size * weight.norm() / update.norm() * update


def check_certificate(weight, result, tolerance):
    """The basis of a tall weight is the exact leading one of a matrix within the tolerance of C; dense, in fp64."""
    moment, basis, r = oracle.second_moment(weight), result.basis.double(), int(result.rank)
    values, scale = result.eigenvalues.double(), torch.linalg.matrix_norm(moment, 2)
    rest = torch.eye(len(moment)) - projector(basis)
    assert torch.linalg.matrix_norm(moment @ basis - basis * values, 2) <= 0.81 * tolerance * scale
    assert torch.linalg.eigvalsh(rest @ moment @ rest)[-1] <= values[r - 1] + 0.37 * tolerance * scale


@pytest.mark.parametrize("shape", ((200, 260), (260, 200)), ids=str)
@pytest.mark.parametrize("options", ({"energy_ratio": 0.9}, {"rank": 4}, {"rank": 0}), ids=str)
def test_subspace_is_certified(shape, options):
    weight = decaying(*shape)
    result = principal_directions(weight, method="subspace", **options)
    expected = principal_directions(weight, method="eigh", **options)
    assert result.method == "subspace"
    assert int(result.rank) == int(expected.rank)
    assert result.eigenvalues.shape == result.rank.shape + (int(result.rank),)
    torch.testing.assert_close(result.eigenvalues, expected.eigenvalues[: int(result.rank)], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(projector(result.basis), projector(expected.basis), rtol=0, atol=1e-8)
    torch.testing.assert_close(result.energy_ratio, expected.energy_ratio)


def test_subspace_grows_its_block(monkeypatch):
    monkeypatch.setattr(subspace, "FIRST_BLOCK", 2)
    monkeypatch.setattr(subspace, "GUARDS", 0)
    weight = decaying(200, 260)
    result = principal_directions(weight, 0.999, method="subspace")
    assert result.method == "subspace"
    assert int(result.rank) > 4
    torch.testing.assert_close(projector(result.basis), projector(principal_directions(weight, 0.999).basis))


@pytest.mark.parametrize(("shape", "energy_ratio"), [((200, 260), 0.3), ((200, 260), 0.95), ((20, 30), 0.5)], ids=str)
def test_subspace_falls_to_eigh_and_says_so(shape, energy_ratio):
    weight = randn(*shape)
    result = principal_directions(weight, energy_ratio, method="subspace")
    expected = principal_directions(weight, energy_ratio, method="eigh")
    assert result.method == "eigh"
    torch.testing.assert_close(result.basis, expected.basis, rtol=0, atol=0)


def test_subspace_leaves_the_random_state_alone():
    weight, state = decaying(200, 260), torch.get_rng_state()
    first = principal_directions(weight, method="subspace")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.basis, principal_directions(weight, method="subspace").basis)


@pytest.mark.parametrize("tolerance", (1e-2, 1e-4, 1e-8, None), ids=str)
@pytest.mark.parametrize("shape", ((200, 260), (260, 200)), ids=str)
def test_warm_start_after_an_edit(shape, tolerance):
    weight = spiked(*shape, strong=6)
    changed = edited(weight)
    result = principal_directions(
        changed, 0.8, method="subspace", start=principal_directions(weight, 0.8), tolerance=tolerance
    )
    values = principal_directions(changed, 0.8, method="eigh").eigenvalues
    r, tolerance = int(result.rank), tolerance or torch.finfo(torch.float64).eps ** 0.75
    assert result.method == "subspace"
    assert r == min(oracle.rank_rule(values, 0.8), *shape)
    # Davis and Kahan: a nearby matrix turns the subspace by its distance over the gap. On the way to features the
    # distance grows by the root of the condition.
    bound = (
        tolerance * values[0] / (values[r - 1] - values[r] - tolerance * values[0]) * (values[0] / values[r - 1]) ** 0.5
    )
    exact = principal_directions(changed, rank=r, method="eigh").basis
    assert torch.linalg.matrix_norm(projector(result.basis) - projector(exact), 2) <= bound + 1e-12
    torch.testing.assert_close(projector(result.basis.mT), torch.eye(r).double(), rtol=0, atol=1e-13)
    if shape[0] > shape[1]:
        check_certificate(changed, result, tolerance)


def test_a_start_saves_work(monkeypatch):
    weight, calls = spiked(260, 200, strong=6), []
    ritz = subspace._ritz
    monkeypatch.setattr(subspace, "_ritz", lambda *a: calls.append(0) or ritz(*a))
    for options in ({}, {"start": principal_directions(weight, 0.8)}):
        assert (
            principal_directions(edited(weight), 0.8, method="subspace", tolerance=1e-2, **options).method == "subspace"
        )
        calls.append(1)
    cold, warm = calls.index(1), len(calls) - calls.index(1) - 2
    assert warm < cold


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("bad", BAD_STARTS.values(), ids=BAD_STARTS.keys())
@pytest.mark.parametrize("shape", ((200, 260), (260, 200)), ids=str)
def test_bad_start(shape, bad, dtype):
    weight = spiked(*shape, strong=6).to(dtype)
    expected = principal_directions(weight, 0.7, method="eigh")
    result = principal_directions(weight, 0.7, method="subspace", start=bad(expected.basis.double()), tolerance=1e-4)
    assert result.method in ("subspace", "eigh")
    assert int(result.rank) == int(expected.rank)
    assert result.basis.dtype == dtype
    torch.testing.assert_close(projector(result.basis), projector(expected.basis), rtol=0, atol=1e-3)
    if result.method == "subspace" and shape[0] > shape[1]:
        check_certificate(weight, result, 1e-4)


def test_start_of_another_dtype():
    weight = spiked(260, 200, strong=6)
    start = principal_directions(weight.half(), 0.7).basis.half()
    result = principal_directions(weight, 0.7, method="subspace", start=start)
    assert (result.method, result.basis.dtype) == ("subspace", torch.float64)
    torch.testing.assert_close(projector(result.basis), projector(principal_directions(weight, 0.7).basis))


@pytest.mark.parametrize("shape", ((200, 260), (260, 200)), ids=str)
def test_large_direction_that_the_start_misses(shape):
    weight = spiked(*shape, strong=4)
    start = principal_directions(weight, rank=4)
    changed = weight + 20 * randn(shape[0], 1, seed=5) @ randn(1, shape[1], seed=6)
    result = principal_directions(changed, rank=4, method="subspace", start=start)
    expected = principal_directions(changed, rank=4, method="eigh")
    torch.testing.assert_close(projector(result.basis), projector(expected.basis), rtol=0, atol=1e-8)
    torch.testing.assert_close(result.eigenvalues[:4], expected.eigenvalues[:4])


def test_certificate_refuses_exact_eigenvectors_that_do_not_lead(monkeypatch):
    # Without guards no residual tells that the largest direction was missed.
    monkeypatch.setattr(subspace, "GUARDS", 0)
    gram = torch.diag(torch.arange(20, 0, -1, dtype=torch.float64))

    def found(*columns, tolerance=1e-3):
        return subspace.leading_eigenpairs(gram, 20, 0.5, 3, torch.eye(20).double()[:, list(columns)], tolerance)

    assert found(1, 2, 3) is None
    assert found(0, 1, 3) is None
    values, vectors, ranks = found(2, 0, 1)
    assert values.tolist() == [20, 19, 18]
    assert projector(vectors).diagonal().tolist() == [1.0] * 3 + [0.0] * 17
    assert int(ranks) == 3
    assert found(0, 1, 3, tolerance=0.1) is None
    assert found(0, 1, 3, tolerance=0.2)[0].tolist() == [20, 19, 17]  # 17 leads within 0.36 of the tolerance, 1.44


def test_certificate_of_a_low_numerical_rank(monkeypatch):
    # Two of three directions and a zero: they lead, and the zero looks like the end of the spectrum.
    monkeypatch.setattr(subspace, "GUARDS", 0)
    gram = torch.diag(torch.tensor([4.0, 3, 2] + [0] * 17, dtype=torch.float64))
    eye = torch.eye(20).double()
    assert subspace.leading_eigenpairs(gram, 20, 1.0, 3, eye[:, [0, 1, 19]], None) is None
    assert int(subspace.leading_eigenpairs(gram, 20, 1.0, 4, eye[:, [0, 1, 2, 19]], None)[2]) == 3


def test_flat_spectrum_falls_to_eigh_despite_a_start():
    weight = randn(200, 260)
    expected = principal_directions(edited(weight), 0.3, method="eigh")
    result = principal_directions(edited(weight), 0.3, method="subspace", start=principal_directions(weight, 0.3))
    assert result.method == "eigh"
    assert torch.equal(result.basis, expected.basis)


def test_no_tolerance_falls_to_eigh():
    weight = spiked(200, 260, strong=6)
    assert principal_directions(weight, rank=6, method="subspace", tolerance=0).method == "eigh"


@pytest.mark.parametrize("shape", ((200, 260), (260, 200)), ids=str)
def test_batch_from_a_ragged_start(shape):
    weight = torch.stack([spiked(*shape, strong=2), spiked(*shape, strong=9, seed=4)])
    changed = torch.stack([edited(w) for w in weight])
    start = principal_directions(weight, 0.8)
    assert len(set(start.rank.tolist())) == 2
    result = principal_directions(changed, 0.8, method="subspace", start=start)
    expected = principal_directions(changed, 0.8, method="eigh")
    assert result.method == "subspace"
    assert torch.equal(result.rank, expected.rank)
    torch.testing.assert_close(projector(result.basis), projector(expected.basis), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.energy_ratio, expected.energy_ratio)
    assert result.basis[0, :, result.rank[0] :].abs().sum() == 0


def test_auto_takes_a_narrow_start():
    weight = spiked(200, 260, strong=6)
    narrow, wide = (principal_directions(weight, rank=rank) for rank in (6, 30))
    assert principal_directions(weight, 0.7).method == "eigh"
    assert principal_directions(weight, 0.7, start=narrow).method == "subspace"
    assert principal_directions(weight, 0.7, start=wide).method == "eigh"
    assert principal_directions(weight, rank=30, start=narrow).method == "eigh"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": torch.ones(4, 2)}, ValueError, r"start must be a basis of shape \[5\] and .*got shape \[4, 2\]"),
        ({"start": torch.ones(2, 5, 2)}, ValueError, r"start must be a basis .*got shape \[2, 5, 2\]"),
        ({"start": torch.ones(5)}, ValueError, "start must have at least 2 dimensions"),
        ({"start": [[1.0]]}, TypeError, "start must be a tensor, got list"),
        ({"start": torch.full((5, 1), float("nan"))}, ValueError, "start must be finite, got NaN or infinity"),
        ({"start": torch.ones(5, 1), "method": "svd"}, ValueError, "start must be None for method='svd'"),
        ({"tolerance": 0.1, "method": "eigh"}, ValueError, "tolerance must be None for method='eigh'"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be between 0 and 1, got -1.0"),
        ({"tolerance": "tight"}, TypeError, "tolerance must be a number, got str"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        principal_directions(torch.ones(3, 5), **options)
