"""Tracked directions: the share they hold, measured densely in fp64, on every kind of spectrum and from any start."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from cases import DTYPES, randn
from test_directions_subspace import BAD_STARTS, edited, spiked

from sphere_kernels import principal_directions
from sphere_kernels._products.reference import TORCH
from sphere_kernels.directions import leading, spectrum, tracked
from sphere_kernels.directions.small_side import SmallSide

pytestmark = pytest.mark.usefixtures("each_impl")

SHAPES = ((130, 300), (300, 130))
RANK_AT_MOST = 1.03


def check_share(weight, result, ratio, at_most=RANK_AT_MOST):
    """Basis, share, bound and Ritz values of one matrix, against C in full; returns the exact rank."""
    moment, basis, r = oracle.second_moment(weight), result.basis.double(), int(result.rank)
    values = torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)
    close = 1e-11 if result.basis.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r).double(), rtol=0, atol=close)
    held = float((basis * (moment @ basis)).sum() / moment.trace())
    numerical = int(torch.linalg.matrix_rank(oracle.unit_rows(weight.double())))
    exact = min(oracle.rank_rule(values, ratio), numerical)
    if r < numerical:
        assert held > ratio - (close if result.method == "eigh" else 0)
    below = result.method == "tracked" and weight.shape[0] > weight.shape[1]
    assert ratio <= float(result.energy_ratio) <= held + close or result.method == "eigh"
    assert below or float(result.energy_ratio) == pytest.approx(held, abs=close)
    assert exact <= r + (result.method == "eigh")  # by Ky Fan no fewer hold the ratio; eigh may round at a plateau
    assert r <= max(exact + 1, at_most * exact)
    most = float(values[:r].sum() / values.sum())
    assert held - close <= most <= float(result.energy_bound) + close <= 1 + 2 * close
    if result.method == "tracked":
        own = result.eigenvalues.double()
        assert result.residual.shape == own.shape == (r,)
        nearest = (own.unsqueeze(-1) - values).abs().amin(-1)
        assert (nearest <= result.residual.double() + close * values[0]).all()
        held_each = (basis * (moment @ basis)).sum(0)
        assert (own <= held_each + close).all()
        if not below:
            torch.testing.assert_close(held_each, own, rtol=0, atol=close)
    else:
        assert result.residual is None
    return exact


def follow(weight, changed, ratio, **options):
    return principal_directions(
        changed, ratio, method="tracked", start=principal_directions(weight, ratio, method="eigh"), **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", (0.0, 0.1, 0.3, 0.5))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_after_an_edit(shape, ratio, dtype):
    weight = randn(*shape, dtype=dtype)
    changed = edited(weight.double()).to(dtype)
    result = follow(weight, changed, ratio)
    assert result.method == "tracked"
    assert result.basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_share(changed, result, ratio)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stays_within_the_rank_for_many_edits(shape):
    weight = randn(*shape, dtype=torch.float32)
    found = principal_directions(weight, 0.4)
    for k in range(25):
        left, right = randn(shape[0], 5, seed=2 * k), randn(5, shape[1], seed=2 * k + 1)
        weight += (0.02 * weight.norm() / (left @ right).norm() * left @ right).float()
        found = principal_directions(weight, 0.4, method="tracked", start=found)
        assert found.method == "tracked"
        check_share(weight, found, 0.4)


def orthonormal(n, d):
    return torch.linalg.qr(randn(max(n, d), min(n, d), seed=3)).Q.reshape(max(n, d), -1)


UGLY = {
    "flat": lambda n, d: orthonormal(n, d) if n > d else orthonormal(n, d).mT,
    "outliers": lambda n, d: spiked(n, d, strong=3),
    "one outlier": lambda n, d: randn(n, d) + 30 * randn(n, 1, seed=1) @ randn(1, d, seed=2),
    "plateaus": lambda n, d: torch.cat([randn(n // 2, d)] * 2 + [randn(n - 2 * (n // 2), d)]),
    "zero rows": lambda n, d: randn(n, d) * (torch.arange(n) % 3 > 0).unsqueeze(-1),
    "coincident rows": lambda n, d: randn(n, d)[torch.arange(n) // 4],
    "opposite rows": lambda n, d: randn(n, d)[torch.arange(n) // 2] * (1 - 2.0 * (torch.arange(n) % 2)).unsqueeze(-1),
    "low rank": lambda n, d: randn(n, 9) @ randn(9, d, seed=1),
    "rows of any length": lambda n, d: randn(n, d) * 10.0 ** (torch.arange(n) % 9 - 4).unsqueeze(-1),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("ratio", (0.0, 0.25, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("ugly", UGLY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ugly_spectra(shape, ugly, ratio, dtype):
    weight = UGLY[ugly](*shape).to(dtype)
    for changed in (weight, edited(weight.double()).to(dtype), edited(weight.double(), rank=40, size=0.5).to(dtype)):
        if ratio == 1.0 and dtype == torch.float32:
            continue  # which of the smallest count is a matter of rounding, see test_directions
        result = follow(weight, changed, ratio)
        check_share(changed, result, ratio)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_that_brings_other_directions(shape):
    """A few large ones that the start knows nothing of, and a rank that jumps up or down."""
    flat, steep = randn(*shape), spiked(*shape, strong=4)
    for before, after in ((flat, steep), (steep, flat), (steep, spiked(*shape, strong=12, seed=9))):
        check_share(after, follow(before, after, 0.5), 0.5)


@pytest.mark.parametrize("ratio", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 2), (20, 50)], ids=str)
def test_small_matrices_are_exact(shape, ratio):
    weight = randn(*shape)
    result = follow(weight, edited(weight, rank=1), ratio)
    assert result.method == "eigh"
    check_share(edited(weight, rank=1), result, ratio)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("bad", BAD_STARTS.values(), ids=BAD_STARTS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bad_start(shape, bad, dtype):
    weight = spiked(*shape, strong=6).to(dtype)
    truth = principal_directions(weight, 0.6, method="eigh").basis.double()
    for ratio in (0.2, 0.6):
        result = principal_directions(weight, ratio, method="tracked", start=bad(truth))
        assert result.basis.dtype == dtype
        check_share(weight, result, ratio)


def test_without_a_start_and_where_too_many_are_needed():
    weight = randn(*SHAPES[0])
    for options in ({}, {"start": principal_directions(weight, 0.7)}, {"start": torch.zeros(300, 0)}):
        result = principal_directions(weight, 0.7, method="tracked", **options)
        assert result.method == "eigh"
        torch.testing.assert_close(result.basis, principal_directions(weight, 0.7).basis, rtol=0, atol=0)
        assert torch.equal(result.energy_bound, result.energy_ratio)


def test_a_share_that_falls_short_is_decomposed(monkeypatch):
    weight, calls = randn(*SHAPES[0]), []
    monkeypatch.setattr(leading, "by_eigh", lambda *a, _by=leading.by_eigh, **k: calls.append(1) or _by(*a, **k))
    start = torch.linalg.qr(randn(300, 40, seed=5)).Q
    result = principal_directions(weight, 0.5, method="tracked", start=start)
    assert (result.method, len(calls)) == ("eigh", 1)


def test_leaves_the_random_state_alone_and_repeats_every_bit():
    weight, state = randn(*SHAPES[0], dtype=torch.float32), torch.get_rng_state()
    first = follow(weight, edited(weight), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    again = follow(weight, edited(weight), 0.5)
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_with_ragged_ranks(shape):
    weight = torch.stack([randn(*shape), spiked(*shape, strong=30), randn(*shape, seed=4), spiked(*shape, strong=5)])
    weight = weight.reshape(2, 2, *shape)
    changed = torch.stack([edited(w) for w in weight.flatten(0, 1)]).view_as(weight)
    result = follow(weight, changed, 0.45)
    assert result.method == "tracked"
    assert len(set(result.rank.flatten().tolist())) > 2
    for i, one in enumerate(changed.flatten(0, 1)):
        r = int(result.rank.flatten()[i])
        basis, residual = result.basis.flatten(0, 1)[i], result.residual.flatten(0, 1)[i]
        assert basis[:, r:].abs().sum() == 0 and residual[r:].abs().sum() == 0
        alone = dataclasses.replace(
            result,
            basis=basis[:, :r],
            eigenvalues=result.eigenvalues.flatten(0, 1)[i, :r],
            rank=result.rank.flatten()[i],
            energy_ratio=result.energy_ratio.flatten()[i],
            energy_bound=result.energy_bound.flatten()[i],
            residual=residual[:r],
        )
        check_share(one, alone, 0.45)


def _not_whitened(inner, outer):
    """Directions scaled to length one, but not made orthogonal."""
    scale = inner.diagonal(dim1=-2, dim2=-1).rsqrt()
    return outer.diagonal(dim1=-2, dim2=-1) * scale.square(), torch.diag_embed(scale)


MUTANTS = {
    "the share is not checked": ("_holds", lambda values, needed: True),
    "half of the share is enough": ("choose_rank", lambda v, t, f, q, r: spectrum.choose_rank(v, t, f, q / 2, r)),
    "no orthogonalisation": ("_ritz", _not_whitened),
    "nobody asks whether it has settled": ("_settled", lambda values, mix, ranks: True),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, monkeypatch):
    def checks():
        weight = randn(*SHAPES[0])
        check_share(edited(weight), follow(weight, edited(weight), 0.5), 0.5)
        check_share(edited(weight, 40, 0.5), follow(weight, edited(weight, 40, 0.5), 0.5), 0.5)
        side = SmallSide.of(weight, TORCH)
        few = leading.by_tracking(side, torch.linalg.eigh(side.gram).eigenvectors[:, -20:], 0.5)
        assert few is None or check_share(weight, few.directions(), 0.5)

    checks()
    monkeypatch.setattr(tracked, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        checks()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "rank must be None for method='tracked', which keeps to energy_ratio, got 2"),
        ({"tolerance": 0.1}, "tolerance must be None for method='tracked'"),
        ({"start": torch.ones(4, 2)}, r"start must be a basis of shape \[5\] and .*got shape \[4, 2\]"),
        ({"start": torch.full((5, 1), float("nan"))}, "start must be finite, got NaN or infinity"),
        ({"start": torch.ones(5, 1), "weight": torch.zeros(3, 5)}, "weight must have a non-zero row"),
        ({"start": torch.ones(5, 1), "weight": torch.full((3, 5), float("nan"))}, "weight must be finite"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        principal_directions(**({"weight": torch.ones(3, 5), "method": "tracked"} | options))
