"""Each method against its formula, written densely in fp64, and each in the loop with and without SPHERE."""

from __future__ import annotations

import dataclasses

import plain
import pytest
import tiny
import torch

from sphere_edit.config import EditConfig
from sphere_edit.methods import METHODS, Method, make_method
from sphere_edit.methods.fine_tuning import tune
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import find_structure
from sphere_edit.targets.optimised import optimise_values
from sphere_edit.targets.presets import PRESETS, auto_layers, preset
from sphere_kernels import LowRankUpdate

D, N = 24, 10
LEAST_SQUARES = ("memit", "rect", "prune")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(seed=0):
    x = randn(3 * D, D, seed=seed).double() * torch.logspace(0, -1.5, D)
    return x.T @ x / len(x)


def batch(b, seed=0):
    return randn(b, D, seed=seed), randn(b, N, seed=seed + 100)


def dense(update):
    return update if isinstance(update, torch.Tensor) else update.left.double() @ update.right.double()


@pytest.mark.parametrize("history", (False, True))
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_least_squares_against_the_covariance(name, history):
    config = EditConfig(method=name, covariance_weight=3.0, history=history)
    method, earlier = make_method(config, {2: covariance()}), torch.zeros(D, D, dtype=torch.float64)
    for step, b in enumerate((3, 1, 30, 4)):
        keys, residuals = batch(b, step)
        k = keys.double().T
        want = torch.linalg.solve(3.0 * covariance() + earlier + k @ k.T, k @ residuals.double()).T
        found = dense(method.solve(2, keys, residuals))
        assert (found - want).norm() < 1e-6 * want.norm()
        method.commit()
        if history:
            earlier += k @ k.T


def test_a_batch_rolled_back_is_not_remembered():
    config = EditConfig(method="memit", covariance_weight=0.1, history=True)
    method, fresh = (make_method(config, {0: covariance()}) for _ in range(2))
    method.solve(0, *batch(5))
    method.rollback()
    method.commit()
    assert torch.equal(method.solve(0, *batch(3, 1)).right, fresh.solve(0, *batch(3, 1)).right)
    method.commit()
    assert not torch.equal(method.solve(0, *batch(3, 2)).right, fresh.solve(0, *batch(3, 2)).right)


def test_rome_of_one_fact_is_its_rank_one_update():
    keys, residuals = batch(1)
    u = torch.linalg.solve(covariance(), keys[0].double())
    found = make_method(EditConfig(method="rome"), {0: covariance()}).solve(0, keys, residuals)
    want = torch.outer(residuals[0].double(), u) / (u @ keys[0].double())
    torch.testing.assert_close(dense(found), want, atol=1e-6, rtol=1e-5)


def test_rome_says_exactly_what_is_asked_with_the_least_change():
    keys, residuals = batch(6)
    found = dense(make_method(EditConfig(method="rome"), {0: covariance()}).solve(0, keys, residuals))
    torch.testing.assert_close(found @ keys.double().T, residuals.double().T, atol=1e-4, rtol=1e-4)
    away = randn(D, seed=9).double()
    away -= keys.double().T @ torch.linalg.lstsq(keys.double().T, away).solution  # changes nothing for the keys
    size = lambda x: float((x @ covariance() * x).sum())  # noqa: E731
    assert size(found) < min(size(found + 0.1 * away), size(found - 0.1 * away))


@pytest.mark.parametrize("noise", (0, 1e-7, 1e-5, 1e-3))
def test_rome_meets_facts_of_equal_keys_in_the_mean(noise):
    """As several facts of one subject have them, up to rounding."""
    keys, residuals = batch(1)
    both = torch.cat([keys, keys * (1 + noise * randn(1, D, seed=7))])
    found = make_method(EditConfig(method="rome"), {0: covariance()}).solve(
        0, both, torch.cat([residuals, 3 * residuals])
    )
    close = 1e-5 + 3 * noise
    torch.testing.assert_close(dense(found) @ keys[0].double(), 2 * residuals[0].double(), atol=close, rtol=close)


@pytest.mark.parametrize("share", (0.4, 0.0, 1.0))
def test_rect_keeps_the_largest_relative_changes(share):
    method = make_method(EditConfig(method="rect", rect_share=share, covariance_weight=1.0), {0: covariance()})
    weight, solved = randn(N, D, seed=5), method.solve(0, *batch(3))
    weight[0, 0] = 0.0
    found = dense(method.reshape(0, solved, weight)).float()
    whole = dense(solved).float()
    kept = found != 0
    assert int(kept.sum()) == round(share * N * D)
    torch.testing.assert_close(found[kept], whole[kept], atol=1e-6, rtol=1e-5)
    if 0 < share < 1:
        change = (whole / weight).abs()
        assert change[kept].min() >= change[~kept].max() and kept[0, 0]
        weight[:, ::2] = 0  # more of them than are kept
        assert int((dense(method.reshape(0, solved, weight)) != 0).sum()) == round(share * N * D)


@pytest.mark.parametrize(("length", "size"), [(0.1, 1.0), (0.05, 0.05), (1.0, 3.0)])
def test_prune_holds_the_singular_values_of_the_total(length, size):
    method = make_method(EditConfig(method="prune"), {0: covariance()})
    original = length * randn(N, D)
    limit = float(torch.linalg.matrix_norm(original.double(), 2))
    small = LowRankUpdate(randn(N, 2) / 1000, randn(2, D, seed=1))
    assert torch.equal(dense(method.restrain(0, small, original.clone(), original)), dense(small))
    weight, total = original + dense(small).float(), dense(small)
    nothing = LowRankUpdate(randn(N, 0), randn(0, D))
    for step in range(6):
        update = LowRankUpdate(size * randn(N, 3, seed=step), randn(3, D, seed=step + 50)) if step % 2 else nothing
        total = total + dense(update)  # of what was solved for, whatever was written
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        assert step == 0 or values[0] > limit > values[-1]
        values = torch.where(values > limit, (values / limit).log().add(limit).minimum(values), values)
        weight = weight + dense(method.restrain(0, update, weight, original)).float()
        want = left @ torch.diag(values) @ right
        assert (weight.double() - original.double() - want).norm() < 2e-5 * want.norm()


def test_prune_prunes_in_the_loop(make):
    editor = make(method="prune", covariance_weight=1e-3, value_clamp=400.0, value_lr=50.0)
    limits = {layer: torch.linalg.matrix_norm(weight, 2) for layer, weight in editor.weights().items()}
    before = {layer: weight.clone() for layer, weight in editor.weights().items()}
    records = editor.edit(tiny.facts(6)).records
    assert all(
        done.update.left.shape[1] > len(record.requests) for record in records for done in record.layers.values()
    )
    for layer, weight in editor.weights().items():
        held = torch.linalg.matrix_norm(weight - before[layer], 2)
        assert limits[layer] < held < limits[layer] + 10


@pytest.mark.parametrize("family", ("llama", "gpt2", "opt"))
def test_fine_tuning_is_adam_on_the_weights(family, make, tokenizer):
    """Against the same steps on the model's own parameters, one fact at a time without padding."""
    layers, facts, steps = (2, 4), tiny.facts(5), 4
    editor = make(family, method="ft", layers=layers, ft_steps=steps, ft_lr=1e-3, ft_stop=0.0)
    twin = tiny.make_model(family)
    with frozen(editor.model):
        found = tune(editor.model, tokenizer, editor.structure, facts, editor.config, layers)
    weights = {layer: find_structure(twin).down[layer].module.weight for layer in layers}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    adam = torch.optim.Adam(weights.values(), lr=1e-3)
    for _ in range(steps):
        adam.zero_grad()
        nll = plain.target_nll(twin, tokenizer, facts)
        nll.mean().backward()
        adam.step()
    for layer, weight in weights.items():
        change = weight.detach() - before[layer]
        change = change if change.shape == found.updates[layer].shape else change.T
        assert change.abs().max() > 5e-4
        far = (found.updates[layer] - change).abs() > 1e-5
        assert far.float().mean() < 0.02  # Adam makes a step of what is rounding only
    torch.testing.assert_close(found.nll, nll.detach(), atol=1e-3, rtol=1e-3)
    assert found.steps == steps


def test_fine_tuning_stops_when_the_facts_are_known(make, tokenizer):
    """So small a model cannot be surer than about 0.8 nats."""
    editor = make(method="ft", layers=(1, 2), ft_steps=200, ft_lr=3e-2, ft_stop=1.0, sphere=False)
    with frozen(editor.model):
        found = tune(editor.model, tokenizer, editor.structure, tiny.facts(2), editor.config, (1, 2))
    assert 1 < found.steps < 200 and found.nll.mean() < 1.0
    before = plain.target_nll(editor.model, tokenizer, tiny.facts(2))
    editor.edit(tiny.facts(2))
    torch.testing.assert_close(plain.target_nll(editor.model, tokenizer, tiny.facts(2)), found.nll, atol=1e-2, rtol=0)
    assert (before > found.nll + 1).all()


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_every_method_edits(family, dtype, name, sphere, make):
    layers = {"rome": (2,), "ft": (3,)}.get(name, (1, 2, 3))
    own = {"ft": {"ft_lr": 0.01}} | {name: {"covariance_weight": 10.0} for name in LEAST_SQUARES}
    editor = make(family, dtype, method=name, layers=layers, sphere=sphere, alpha=1.0, **own.get(name, {}))
    before = {layer: weight.clone() for layer, weight in editor.weights().items()}
    inside = {layer: plain.principal_projector(weight, 0.5) for layer, weight in before.items()}
    result = editor.edit(tiny.facts(2))
    for layer, weight in editor.weights().items():
        change = (weight - before[layer]).double()
        assert change.norm() > 1e-3
        if dtype == torch.float32:
            share = float((change @ inside[layer]).norm() / change.norm())
            assert share < 1e-3 if sphere else share > 0.1
        (update,) = result.updates[layer]
        assert update.shape == weight.shape if isinstance(update, torch.Tensor) else update.left.shape[0] == len(weight)
    assert isinstance(editor._engine.method, Method)
    editor.revert()
    assert all(torch.equal(weight, before[layer]) for layer, weight in editor.weights().items())


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_values_that_are_not_finite_change_nothing(name, make, monkeypatch):
    def broken(*args):
        found = optimise_values(*args)
        return dataclasses.replace(found, target=found.target * float("nan"))

    monkeypatch.setattr("sphere_edit.editing.batch.optimise_values", broken)
    editor = make(method=name, covariance_weight=10.0)
    before = tiny.state(editor.model)
    with pytest.raises(FloatingPointError, match="layer 1: the update holds NaN or infinity"):
        editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)


def test_a_likelihood_that_is_not_finite_changes_nothing(make):
    editor = make(method="ft", layers=(2,), ft_steps=3, ft_lr=3e37)
    before = tiny.state(editor.model)
    with pytest.raises(FloatingPointError, match="fine-tuned update or its likelihood holds NaN"):
        editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)


def test_fine_tuning_needs_no_covariance(make, monkeypatch):
    monkeypatch.setattr("sphere_edit.editing.editor.key_covariances", lambda *args: pytest.fail("no keys are needed"))
    make(method="ft", layers=(4,), ft_steps=2).edit(tiny.facts(2))  # also the last block


def test_published_settings_of_each_method():
    assert preset("llama3-8b").alpha == 0.5 and preset("llama3-8b") == PRESETS["llama3-8b"]
    for name in LEAST_SQUARES:
        found = preset("llama3-8b", name)
        assert (found.method, found.alpha, found.layers) == (name, 0.8, (4, 5, 6, 7, 8))
    assert preset("llama3-8b", "rome").layers == (5,)
    assert [preset(name, "ft").layers for name in ("llama3-8b", "qwen2.5-7b")] == [(21,), (27,)]
    assert preset("smollm2-135m", "ft").layers == () and auto_layers(30, "ft") == (19,)
    assert auto_layers(32, "rome") == (5,) and auto_layers(32, "ft") == (21,) and auto_layers(2, "ft") == (1,)
    assert auto_layers(1, "rome") == () and auto_layers(1, "ft") == (0,)
    assert preset("gpt2-xl", "rome").layers == (17,) and preset("gpt2-xl", "prune").covariance_weight == 20000
    weights = [preset("smollm2-135m", name).covariance_weight for name in LEAST_SQUARES]
    assert weights == [1500] * 3 and preset("smollm2-135m").covariance_weight == EditConfig().covariance_weight
    assert preset("llama3-8b", "rome").value_clamp == 4.0
    assert (found.rect_share, found.ft_steps, found.ft_lr) == (0.4, 25, 5e-4)


def test_a_method_of_ones_own_is_a_few_lines(make, monkeypatch):
    class Ridge(Method):
        """Least squares towards no change at all."""

        def solve(self, layer, keys, residuals):
            system = keys @ keys.T + torch.eye(len(keys))
            return LowRankUpdate(residuals.T.contiguous(), torch.linalg.solve(system, keys))

    monkeypatch.setitem(METHODS, "ridge", Ridge)
    own, same = make(method="ridge"), make(method="alphaedit", ridge=1.0, null_space=False)
    for editor in (own, same):
        editor.edit(tiny.facts(2))  # one batch: there is no history yet
    for layer in (1, 2, 3):
        torch.testing.assert_close(own.weights()[layer], same.weights()[layer], atol=1e-4, rtol=1e-3)
