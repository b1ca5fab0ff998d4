"""Streams of updates for the tests of the streaming state, and the same by dense d x d matrices in fp64."""

from __future__ import annotations

import itertools

import oracle
import torch
from cases import randn

SCHEDULES = list(itertools.product((1, 3, 10), ("current", "pretrained")))


WIDE = (torch.float64, torch.float32)


class Dense:
    """What the state must agree with: everything anew from the weight, matrix by matrix, C in full."""

    def __init__(self, weight, s=1.0, energy_ratio=0.5, alpha=0.5, refresh_every=1, subspace="current"):
        self.weight = weight.detach().double().clone()
        self.s, self.ratio, self.alpha = s, energy_ratio, alpha
        self.every, self.subspace, self.updates = refresh_every, subspace, 0
        self.projectors, self.ranks, self.shares = self._directions()

    def _directions(self):
        d, projectors, ranks, shares = self.weight.shape[-1], [], [], []
        for weight in self.weight.reshape(-1, *self.weight.shape[-2:]):
            values, vectors = torch.linalg.eigh(oracle.second_moment(weight))
            numerical = int(torch.linalg.matrix_rank(oracle.unit_rows(weight)))
            rank = min(oracle.rank_rule(values.flip(0).clamp(min=0), self.ratio), numerical)
            basis = vectors[:, d - rank :]
            projectors.append(basis @ basis.T)
            ranks.append(rank)
            shares.append(values[d - rank :].sum() / values.sum())
        leading = self.weight.shape[:-2]
        ranks, shares = torch.tensor(ranks).view(leading), torch.stack(shares).view(leading)
        return torch.stack(projectors).view(*leading, d, d), ranks, shares

    def project(self, right):
        return right.double() - self.alpha * right.double() @ self.projectors

    def update_(self, left, right):
        self.weight += left.double() @ right.double()
        self.updates += 1
        if self.subspace == "current" and self.updates % self.every == 0:
            self.projectors, self.ranks, self.shares = self._directions()

    def per_neuron(self):
        return oracle.per_neuron(self.weight, self.s)


def factors(weight, b, seed, size=0.1):
    """An update's factors, in fp32 or fp64; each batch turns the directions by far more than any tolerance."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    *leading, n, d = weight.shape
    return size * randn(*leading, n, b, dtype=wide, seed=seed), randn(*leading, b, d, dtype=wide, seed=seed + 1000)


def bits(state):
    """Copies of all that a state or a solver holds."""
    held = state.state_dict() | ({"weight": state.weight} if hasattr(state, "weight") else {})
    return {name: value.clone() for name, value in held.items()}


def assert_same_bits(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def assert_agrees(state, dense, right, tolerance):
    """Weight, Gram matrix, energies, directions and what they do to a right factor."""
    wide = state.master.dtype
    scale = max(1.0, float(dense.weight.abs().max())) ** 2 * dense.weight.shape[-1]
    torch.testing.assert_close(state.master.double(), dense.weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.gram.double(), dense.weight @ dense.weight.mT, rtol=0, atol=tolerance * scale)
    assert torch.equal(state.gram, state.gram.mT)
    expected = dense.per_neuron()
    torch.testing.assert_close(state.neuron_energy, expected, rtol=100 * tolerance, atol=100 * tolerance)
    assert torch.equal(state.energy, state.neuron_energy.sum(-1))
    torch.testing.assert_close(state.norms, oracle.norms(dense.weight), rtol=0, atol=tolerance * scale**0.5)
    projected = state.project(right)
    assert projected.dtype == wide
    allowed = 100 * tolerance * (1 + right.double().norm(dim=-1, keepdim=True))
    assert ((projected.double() - dense.project(right)).abs() <= allowed).all()
    assert torch.equal(state.rank, dense.ranks)
    torch.testing.assert_close(state.held_ratio, dense.shares, rtol=0, atol=100 * tolerance)
    basis = state.directions.basis.double()
    torch.testing.assert_close(basis @ basis.mT, dense.projectors, rtol=0, atol=100 * tolerance)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}  # of a handful of updates


def step(state, k, project=True):
    left, right = factors(state.weight, 2, seed=k)
    state.update_(left, state.project(right) if project else right)
