"""REVIVE against its formula, written out in fp64, and in the loop with every method, with and without SPHERE."""

from __future__ import annotations

import plain
import pytest
import tiny
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.methods import METHODS
from sphere_edit.methods.revive import Revive
from sphere_kernels import LowRankUpdate

_OWN = {name: {"covariance_weight": 10.0} for name in ("memit", "rect", "prune")} | {"ft": {"ft_lr": 0.01}}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leading(weight, mass):
    """The k leading singular vectors, left ``[n, k]`` and right ``[d, k]``, in fp64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    k = next(k for k in range(len(values)) if values[: k + 1].sum() >= mass * values.sum()) + 1
    return left[:, :k], right[:k].T


def inside(change, weight, mass):
    """The shares of a change that lie in the protected rows and columns."""
    left, right = leading(weight, mass)
    return float((left.T @ change).norm() / change.norm()), float((change @ right).norm() / change.norm())


@pytest.mark.parametrize("mass", (0.05, 0.3, 0.8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("n", "d"), [(10, 24), (24, 10)])
def test_the_formula(n, d, dtype, mass):
    weight = (randn(n, d) * torch.logspace(0, -1.5, d)).to(dtype)
    update = LowRankUpdate(randn(n, 3, seed=1), randn(3, d, seed=2))
    dense = update.left.double() @ update.right.double()
    left, right = leading(weight, mass)
    want = (torch.eye(n) - left @ left.T) @ dense @ (torch.eye(d) - right @ right.T)
    revive = Revive(weight, mass, 0)
    assert revive.left.shape == left.shape and revive.right.shape == right.shape
    factors, whole = revive(update), revive(dense.float())
    assert isinstance(factors, LowRankUpdate) and isinstance(whole, torch.Tensor)
    for found in (factors.left.double() @ factors.right.double(), whole.double()):
        assert (found - want).norm() < 1e-5 * dense.norm()


def test_the_share_is_of_singular_values_not_of_their_squares():
    weight = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]))  # 3 of 8, 9 of 18
    assert [Revive(weight, mass, 0).left.shape[1] for mass in (0.37, 0.38, 0.62, 0.63)] == [1, 2, 2, 3]


def test_a_share_that_leaves_nothing_is_refused(make):
    with pytest.raises(ValueError, match=r"layer 7: revive = 0.99 protects all 10 singular directions; expected"):
        Revive(randn(10, 24), 0.99, 7)
    editor = make(revive=0.999)
    before = tiny.state(editor.model)
    with pytest.raises(ValueError, match="layer 1: revive = 0.999 protects all 32"):
        editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)


def test_copies_are_restrained_outside_the_loop():
    with pytest.raises(ConfigError, match="revive: expected 0 where prune_in is 'copies' and the loop whole, got 0.1"):
        EditConfig(method="prune", prune_in="copies", revive=0.1)


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_directions_alone(name, sphere, make):
    layers = {"rome": (2,), "ft": (3,)}.get(name, (1, 2, 3))
    settings = {"method": name, "layers": layers, "sphere": sphere, **_OWN.get(name, {})}
    editor, bare = make(revive=0.3, **settings), make(**settings)
    before = {layer: weight.clone() for layer, weight in editor.weights().items()}
    result = editor.edit(tiny.facts(6))  # three batches: the directions stay those of the pretrained weight
    bare.edit(tiny.facts(2))
    for layer, weight in editor.weights().items():
        assert max(inside((weight - before[layer]).double(), before[layer], 0.3)) < 1e-4
        assert min(inside((bare.weights()[layer] - before[layer]).double(), before[layer], 0.3)) > 0.05
    said = [event["protected"] for event in result.events if event["event"] == "energy" and event["batch"]]
    assert len(said) == 3 * len(layers) and all(0.05 < share < 1 for share in said)
    editor.revert()
    assert all(torch.equal(weight, before[layer]) for layer, weight in editor.weights().items())


@pytest.mark.parametrize("targets", ("closed_loop", "gradient"))
def test_other_targets(targets, make):
    editor = make(targets=targets, revive=0.3)
    before = {layer: weight.clone() for layer, weight in editor.weights().items()}
    editor.edit(tiny.facts(4))
    for layer, weight in editor.weights().items():
        change = (weight - before[layer]).double()
        assert change.norm() > 1e-4 and max(inside(change, before[layer], 0.3)) < 1e-3


@pytest.mark.parametrize("alpha", (0.5, 1.0))
def test_it_follows_spheres_projection(alpha, make):
    """One batch at one layer: the update without either, projected by hand."""
    settings = {"method": "ridge", "layers": (2,), "alpha": alpha}
    alone, both = make(sphere=False, **settings), make(revive=0.3, **settings)
    before = both.weights()[2].clone()
    bare = alone.edit(tiny.facts(2)).updates[2][0]
    found = both.edit(tiny.facts(2)).updates[2][0]
    left, right = leading(before, 0.3)
    want = (torch.eye(len(before)) - left @ left.T) @ (bare.left.double() @ bare.right.double())
    want = want @ (torch.eye(before.shape[1]) - alpha * plain.principal_projector(before, 0.5))
    want = want @ (torch.eye(before.shape[1]) - right @ right.T)
    assert (found.left.double() @ found.right.double() - want).norm() < 1e-4 * want.norm()
