"""Gradient targets: against plain loops and dense formulas, with every method, and to the same bits again."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import plain
import pytest
import tiny
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.data.records import ReplayError
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.files import tensor_sha256
from sphere_edit.methods import make_method
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import find_structure
from sphere_edit.model.tokens import encode
from sphere_edit.targets import gradient
from sphere_edit.targets.gradient import Lifelong, Moments, look_back
from sphere_edit.targets.others import other_facts
from sphere_edit.targets.presets import auto_layers, preset

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of")

_LAYERS = (1, 2, 3)
_OWN = {
    "ridge": {"ridge": 1.0, "null_space": False},
    "alphaedit": {"ridge": 1.0, "null_space_threshold": 3.0},
    "alphaedit-ridge": {"method": "alphaedit", "ridge": 1.0, "null_space": False},
    "memit": {"covariance_weight": 1.0},
    "memit-history": {"method": "memit", "covariance_weight": 1.0, "history": True},
    "rect": {"covariance_weight": 1.0},
    "prune": {"covariance_weight": 1.0},
    "prune-copies": {"method": "prune", "covariance_weight": 1.0, "prune_in": "copies"},
    "rome": {},
}


def _settings(name: str = "ridge", **changes) -> EditConfig:
    settings = {"layers": _LAYERS, "targets": "gradient", "gradient_lr": 0.3, "contexts": 0, "covariance_tokens": 600}
    own = {"batch_size": 3, "method": name, **_OWN[name], **changes}
    return EditConfig().replace(**settings | own)


@pytest.fixture
def edit(tokenizer, tmp_path):
    """An editor of a fresh model."""

    def build(name="ridge", family="llama", dtype=torch.float32, **changes):
        cache = tmp_path / "covariance"
        return SphereEditor(tiny.make_model(family, dtype=dtype), tokenizer, _settings(name, **changes), cache=cache)

    return build


def _slow(model, tokenizer, structure, facts, layers=_LAYERS):
    """Keys and gradients by layer, one fact at a time, unpadded, by autograd."""
    keys, gradients, likely = {i: [] for i in layers}, {i: [] for i in layers}, []
    for fact in facts:
        prompt = tokenizer(fact.text)["input_ids"]
        whole = tokenizer(f"{fact.text} {fact.target_new}")["input_ids"]
        kept, handles = {}, []
        for layer in layers:  # Falcon adds to what its MLP gives in place
            module, width = structure.edited[layer].module, len(structure.edited[layer].weight)
            zero = torch.zeros(1, len(whole), width, requires_grad=True)
            handles += [
                module.register_forward_hook(lambda _, args, out, zero=zero: out + zero.view(out.shape)),
                module.register_forward_pre_hook(
                    lambda _, args, i=layer, zero=zero, kept=kept: kept.update({i: (args[0], zero)})
                ),
            ]
        log_probs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        places = range(len(prompt) - 1, len(whole) - 1)
        nll = -torch.stack([log_probs[i, whole[i + 1]] for i in places]).mean()
        nll.backward()
        likely.append(float(nll.detach()))
        for layer, (entered, zero) in kept.items():
            keys[layer].append(entered.detach().reshape(len(whole), -1)[list(places)])
            gradients[layer].append(zero.grad[0][list(places)])
    return {i: torch.cat(k) for i, k in keys.items()}, {i: torch.cat(g) for i, g in gradients.items()}, likely


def _rows(tokenizer, facts):
    return [encode(tokenizer, fact.prompt, fact.subject, fact.target_new) for fact in facts]


@pytest.mark.parametrize("modules", ("down", "up"))
def test_one_pass_sees_what_a_plain_loop_sees(family, modules, tokenizer):
    model = tiny.make_model(family)
    try:
        structure = find_structure(model, modules)
    except ValueError:
        structure = find_structure(model, "fused")
    facts = tiny.facts(6)
    with frozen(model):
        seen = look_back(model, structure, _rows(tokenizer, facts), _LAYERS)
        keys, gradients, nll = _slow(model, tokenizer, structure, facts)
    torch.testing.assert_close(seen.nll, torch.tensor(nll), atol=1e-4, rtol=1e-4)
    for layer in _LAYERS:
        assert seen.keys[layer].shape[0] == sum(len(row.target) for row in _rows(tokenizer, facts)) > len(facts)
        torch.testing.assert_close(seen.keys[layer], keys[layer], atol=2e-5, rtol=1e-4)
        size = gradients[layer].abs().max()
        assert size > 1e-4
        torch.testing.assert_close(seen.gradients[layer] / size, gradients[layer] / size, atol=1e-4, rtol=1e-3)


def test_a_gradient_is_what_the_loss_changes_by(tokenizer):
    """Of one fact whose target has several tokens: central differences in a random direction at one position."""
    model, fact = tiny.make_model("llama").double(), tiny.facts(2)[1]
    structure, (row,) = find_structure(model), _rows(tokenizer, [fact])
    with frozen(model):
        seen = look_back(model, structure, [row], (2,))
    along = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    at, losses = len(row.ids) - len(row.target) + 1, []
    for sign in (1, -1):
        shift = torch.zeros(1, len(row.ids), tiny.HIDDEN, dtype=torch.float64)
        shift[0, at] = 1e-4 * sign * along
        handle = structure.edited[2].module.register_forward_hook(lambda _, args, out, shift=shift: out + shift)
        losses.append(_nll(model, row))
        handle.remove()
    assert float(seen.gradients[2][1].double() @ along) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)


@torch.no_grad()
def _nll(model, row):
    log_probs = model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)[-len(row.target) :]
    return float(-log_probs.gather(1, torch.tensor(row.target)[:, None]).mean())


def _z(p, width, seed):
    z = torch.randn(p, width, generator=torch.Generator().manual_seed(seed))
    return z * torch.logspace(-4, 2, width) + 10 * torch.arange(width)


def test_merged_statistics_are_those_of_all_positions():
    parts = [_z(p, 9, seed) for seed, p in enumerate((1, 5, 2, 40))]
    moments = Moments.none(torch.zeros(4, 5), whiten=True)
    for i, part in enumerate(parts):
        moments, whole = moments.merged(part), torch.cat(parts[: i + 1]).double()
        assert moments.count == len(whole)
        torch.testing.assert_close(moments.mean, whole.mean(0), atol=0, rtol=1e-12)
        if i:
            want = (part.double() - whole.mean(0)) / whole.std(0)
            torch.testing.assert_close(moments.normalised(part), want, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(moments.products / (len(whole) - 1), whole[:, -4:].T.cov(), atol=0, rtol=1e-6)
    assert torch.equal(Moments.none(torch.zeros(4, 5), False).merged(parts[0]).normalised(parts[0]), torch.zeros(1, 9))


def test_a_feature_that_never_varies_asks_for_nothing():
    z = _z(7, 9, 0)
    z[:, 2], z[:, 6] = 0.0, 0.1  # as a dead neuron's input
    found = Moments.none(torch.zeros(4, 5), False).merged(z[:3]).merged(z[3:]).normalised(z)
    assert torch.isfinite(found).all() and (found[:, [2, 6]] == 0).all() and (found[:, [1, 3]] != 0).all()


def test_whitened_gradients():
    g = _z(60, 4, 1) @ torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    moments = Moments.none(torch.zeros(4, 5), True)
    keys = torch.randn(60, 5, generator=torch.Generator().manual_seed(4))
    z = torch.cat([keys, g], 1)
    few = moments.merged(z[:5])
    assert few.whitened(g[:5]) is None and moments.merged(z[:6]).whitened(g[:6]) is not None
    assert Moments.none(torch.zeros(4, 5), False).merged(z).whitened(g) is None
    centred = g.double() - g.double().mean(0)
    covariance = centred.T @ centred / (60 - 4 - 1)
    left, values, _ = torch.linalg.svd(covariance)
    assert values[-1] < gradient._FLOOR * values.mean() < values[0]
    inverse_root = left @ torch.diag(values.clamp_min(gradient._FLOOR * values.mean()) ** -0.5) @ left.T
    found = moments.merged(z[:20]).merged(z[20:]).whitened(g)
    torch.testing.assert_close(found, centred @ inverse_root, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whiten", (False, True))
def test_wanted_changes(whiten):
    config = _settings(gradient_whiten=whiten, gradient_lr=0.7)
    lifelong, d, n = Lifelong({4: torch.zeros(6, 9)}, config), 9, 6
    keys, gradients = _z(20, d, 5), _z(20, n, 6)
    for start in (0, 12):
        part = slice(start, start + 12)
        lifelong.see(4, keys[part], gradients[part])
        residuals = lifelong.residuals(4, keys[part])
        sofar = torch.cat([keys, gradients], 1)[: start + 12].double()
        hat = (sofar[part] - sofar.mean(0)) / sofar.std(0)
        toward = hat[:, d:]
        if whiten:
            centred = sofar[:, d:] - sofar[:, d:].mean(0)
            values, vectors = torch.linalg.eigh(centred.T @ centred / (len(sofar) - n - 1))
            floor = gradient._FLOOR * values.mean()
            toward = centred[part] @ vectors @ torch.diag(values.clamp_min(floor) ** -0.5) @ vectors.T
        want = -0.7 / d * hat[:, :d].square().sum(1, keepdim=True) * toward
        torch.testing.assert_close(residuals.double(), want, atol=1e-5, rtol=1e-4)
        lifelong.commit()


@pytest.mark.parametrize("modules", ("down", "gate"))
def test_two_batches_without_sphere_are_ultraedits(modules, edit, tokenizer):
    """All of it by dense formulas: one pass, statistics of all positions so far, a d×d solve without a history."""
    editor = edit(modules=modules, sphere=False, ridge=2.0)
    twin = tiny.make_model("llama")
    structure, facts, sofar = find_structure(twin, modules), tiny.facts(6), {layer: [] for layer in _LAYERS}
    editor.edit(facts)
    for part in (facts[:3], facts[3:]):
        with frozen(twin):
            keys, gradients, _ = _slow(twin, tokenizer, structure, part)
        for layer in _LAYERS:
            weight = structure.edited[layer].weight
            h, d = keys[layer].double(), weight.shape[1]
            sofar[layer].append(torch.cat([h, gradients[layer].double()], 1))
            z = torch.cat(sofar[layer])
            hat = (sofar[layer][-1] - z.mean(0)) / z.std(0)
            v = -0.3 / d * hat[:, :d].square().sum(1, keepdim=True) * hat[:, d:]
            system = h.T @ h + 2.0 * torch.eye(d, dtype=torch.float64)
            weight += torch.linalg.solve(system, h.T @ v).T.float()
    for layer, weight in editor.weights().items():
        change = weight - editor.original_weights()[layer]
        want = structure.edited[layer].weight - editor.original_weights()[layer]
        assert change.norm() > 1e-3 and (change - want).norm() < 2e-3 * want.norm()


def test_ridge_is_alphaedit_that_forgets():
    d, n = 12, 5
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, d, generator=draw).double() * torch.logspace(0, -2, d)
    covariance = {3: x.T @ x / 40}
    for null_space in (True, False):
        config = EditConfig(method="ridge", ridge=0.5, null_space=null_space, null_space_threshold=1e-2)
        ridge = make_method(config, covariance)
        alphaedit = make_method(config.replace(method="alphaedit", ridge=0.5, null_space=null_space), covariance)
        for step in range(3):
            keys, residuals = torch.randn(4, d, generator=draw), torch.randn(4, n, generator=draw)
            values, vectors = torch.linalg.eigh(covariance[3])
            kept = vectors[:, values < 1e-2] if null_space else vectors
            want = plain.alphaedit(kept @ kept.T, torch.zeros(d, d), 0.5, keys, residuals)
            found = ridge.solve(3, keys, residuals)
            torch.testing.assert_close(found.left.double() @ found.right.double(), want, atol=1e-5, rtol=1e-4)
            other = alphaedit.solve(3, keys, residuals)
            assert torch.equal(other.right, found.right) == (step == 0)
            ridge.commit()
            alphaedit.commit()


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize("name", _OWN)
def test_every_solving_method_makes_targets_likelier(name, sphere, edit, tokenizer):
    editor = edit(name, sphere=sphere, alpha=1.0, gradient_lr=1.0)
    facts, before = tiny.facts(6), tiny.state(editor.model)
    inside = {layer: plain.principal_projector(weight, 0.5) for layer, weight in editor.weights().items()}
    unlikely = plain.target_nll(editor.model, tokenizer, facts)
    editor.edit(facts[:3])
    for layer, weight in editor.weights().items():
        change = (weight - editor.original_weights()[layer]).double()
        share = float((change @ inside[layer]).norm() / change.norm())
        assert share < 1e-3 if sphere and name != "prune-copies" else share > 0.1
    events = editor.edit(facts[3:]).events
    (told,) = [event for event in events if event["event"] == "batch"]
    rows = _rows(tokenizer, facts[3:])
    assert told["positions"] == sum(len(row.target) for row in rows) and told["nll"] > 0
    assert {"pass", "statistics", "solve"} < told["seconds"].keys()
    assert plain.target_nll(editor.model, tokenizer, facts).mean() < unlikely.mean() - 0.1
    editor.revert()
    assert tiny.same(editor.model, before)


@pytest.mark.parametrize("project", ("layer", "solve"))
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("opt", torch.float32), ("gemma2", torch.float32), ("gpt2", torch.bfloat16), ("phi3", torch.float32)],
)
def test_families(family, dtype, project, edit, tokenizer):
    editor = edit("alphaedit", family, dtype, project=project, gradient_lr=1.0, null_space=False)
    unlikely = plain.target_nll(editor.model, tokenizer, tiny.facts(3))
    editor.edit(tiny.facts(3))
    assert plain.target_nll(editor.model, tokenizer, tiny.facts(3)).mean() < unlikely.mean() - 0.05


def _bits(editor):
    return {name: tensor_sha256(value) for name, value in editor.state_dict().items()}


@pytest.mark.parametrize("whiten", (False, True))
@pytest.mark.parametrize("name", ("ridge", "alphaedit"))
def test_replayed_rewound_and_loaded_bit_for_bit(name, whiten, edit):
    editor, facts = edit(name, gradient_whiten=whiten, batch_size=2), tiny.facts(6)
    states, records = [], []
    for i in range(3):
        records += editor.edit(facts[2 * i : 2 * i + 2]).records
        states.append(_bits(editor))
    assert len({states[i]["engine.lifelong.2.mean"] for i in range(3)}) == 3
    other = edit(name, gradient_whiten=whiten, batch_size=2)
    for record, state in zip(records, states, strict=True):
        other.replay(record)
        assert _bits(other) == state
    other.rewind(records[:1])
    assert _bits(other) == states[0]
    kept = {name: value.clone() for name, value in editor.state_dict().items()}
    loaded = edit(name, gradient_whiten=whiten, batch_size=2)
    loaded.edit(facts[4:])
    loaded.load_state_dict(kept)
    assert _bits(loaded) == states[2]
    for one in (other, loaded):
        one.rewind(records[:2])
        one.edit(facts[4:])
        assert _bits(one) == states[2]
    editor.revert()
    editor.edit(facts[:2])
    assert _bits(editor) == states[0]


def test_an_interrupted_batch_is_forgotten(edit, monkeypatch):
    editor, facts = edit(), tiny.facts(6)
    editor.edit(facts[:3])
    before = _bits(editor)
    real = editor._engine.write

    def broken(layer, *args):
        if layer == 2:
            raise KeyboardInterrupt
        return real(layer, *args)

    monkeypatch.setattr(editor._engine, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(facts[3:])
    assert _bits(editor) == before
    monkeypatch.undo()
    editor.edit(facts[3:])
    other = edit()
    other.edit(facts)
    assert _bits(editor) == _bits(other)


def test_states_and_records_that_do_not_fit(edit):
    editor = edit()
    (record,) = editor.edit(tiny.facts(3)).records
    state = editor.state_dict()
    with pytest.raises(ValueError, match=r"statistics of gradients: expected .*, got"):
        edit(gradient_whiten=True).load_state_dict(state)
    bare = {i: dataclasses.replace(done, gradients=None) for i, done in record.layers.items()}
    other = edit()
    with pytest.raises(ReplayError, match="layer 1: the record has no gradients"):
        other.replay(dataclasses.replace(record, layers=bare))
    other.replay(record)
    assert _bits(other) == _bits(editor)


def test_gradients_that_are_not_finite_change_nothing(edit, monkeypatch):
    def broken(*args):
        seen = look_back(*args)
        return dataclasses.replace(seen, nll=seen.nll * float("nan"))

    monkeypatch.setattr("sphere_edit.editing.batch.look_back", broken)
    editor = edit()
    before = tiny.state(editor.model)
    with pytest.raises(FloatingPointError, match="a gradient or likelihood holds NaN"):
        editor.edit(tiny.facts(3))
    assert tiny.same(editor.model, before)


def test_statistics_begin_with_other_facts(edit, tokenizer, monkeypatch):
    others = tiny.places(5)
    monkeypatch.setattr("sphere_edit.targets.others.world_facts", lambda seed: others if seed == 1 else [])
    with pytest.raises(ValueError, match="gradient_preheat: expected at most 5, .*, got 6"):
        edit(gradient_preheat=6).prepare()
    editor = edit(gradient_preheat=4, batch_size=3)
    assert other_facts("gradient_preheat", 4, 0) == [others[i] for i in (0, 1, 2, 3)]
    before = tiny.state(editor.model)
    editor.prepare()
    assert tiny.same(editor.model, before) and editor.batches == 0
    with frozen(editor.model):
        keys, gradients, _ = _slow(editor.model, tokenizer, editor.structure, others[:4])
    for layer in _LAYERS:
        z = torch.cat([keys[layer], gradients[layer]], 1).double()
        state = editor.state_dict()
        assert int(state[f"engine.lifelong.{layer}.count"]) == len(z)
        torch.testing.assert_close(state[f"engine.lifelong.{layer}.mean"], z.mean(0), atol=1e-5, rtol=1e-3)
    prepared, print_ = _bits(editor), editor.fingerprints()["preheating facts"]
    editor.edit(tiny.facts(3))
    assert _bits(editor) != prepared
    editor.rewind([])
    assert _bits(editor) == prepared
    assert edit(gradient_preheat=3).fingerprints()["preheating facts"] != print_
    fields = ("prompt", "subject", "target_new", "target_true", "paraphrases", "neighborhood", "relation", "id")
    fields += ("neighborhood_answers", "generation")  # of runs older than portability, which go on
    facts = [{name: getattr(fact, name) for name in fields} for fact in others[:4]]
    assert print_ == hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    assert "preheating facts" not in edit().fingerprints()


def test_other_facts_are_of_the_world():
    few, more = (other_facts("gradient_preheat", n, 0) for n in (10, 40))
    assert len({fact.id for fact in more}) == 40 and len({fact.relation for fact in more}) > 3
    assert other_facts("gradient_preheat", 10, 0) == few != other_facts("gradient_preheat", 10, 1)
    assert other_facts("gradient_preheat", 0, 0) == []


@pytest.mark.parametrize("setting", [{"gradient_lr": 0.1}, {"gradient_whiten": True}, {"gradient_preheat": 3}], ids=str)
def test_settings_are_refused_elsewhere(setting):
    (name,) = setting
    for targets in ("closed_loop", "optimised"):
        with pytest.raises(ConfigError, match=f"{name}: only gradient targets have a use for it, not {targets}"):
            EditConfig(targets=targets, **setting)
    with pytest.raises(ConfigError, match=f"{name}: only gradient targets have a use for it, not ft"):
        EditConfig(method="ft", **setting)
    with pytest.raises(ConfigError, match="loop_step: only closed_loop targets"):
        EditConfig(targets="gradient", loop_step=0.5)
    assert EditConfig(targets="gradient", **setting).replace(targets="closed_loop") == EditConfig()


def test_presets():
    ultra, stable = preset("ultraedit"), preset("stableedit")
    assert (ultra.method, ultra.targets, ultra.sphere, ultra.null_space) == ("ridge", "gradient", False, False)
    assert (ultra.ridge, ultra.gradient_lr, ultra.gradient_whiten, ultra.gradient_preheat) == (1.0, 4e-3, False, 0)
    assert (stable.ridge, stable.gradient_whiten, stable.gradient_preheat > 0) == (10.0, True, True)
    assert preset("ultraedit", "memit").targets == "gradient" and preset("ultraedit", "ft").targets == "closed_loop"
    assert preset("ultraedit", "alphaedit").null_space is False
    tuned = preset("smollm2-135m", targets="gradient")
    assert (tuned.method, tuned.layers, tuned.sphere) == ("alphaedit", (24, 25, 26, 27, 28), True)
    assert not tuned.null_space and preset("smollm2-135m", "memit", "gradient").layers == tuned.layers
    assert tuned.gradient_lr > 100 * EditConfig().gradient_lr and tuned.contexts == 0


def test_layers_for_gradients(tokenizer):
    assert auto_layers(30, "ridge", "gradient") == (24, 25, 26, 27, 28)
    assert auto_layers(5, "rome", "gradient") == (0, 1, 2, 3) and auto_layers(32, "ft", "gradient") == (21,)
    assert SphereEditor(tiny.make_model("llama", num_hidden_layers=8), tokenizer, "ultraedit").config.layers == tuple(
        range(2, 7)
    )
