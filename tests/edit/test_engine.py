"""The engine under the loop: batches as records, states that go on bit for bit, undoing, and what a batch may cost."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from sphere_edit.data.records import ReplayError
from sphere_edit.model.inference import frozen
from sphere_edit.targets.keys import LayerPass
from sphere_kernels import LowRankUpdate

_SETTINGS = {
    "default": {},
    "stale": {"refresh_every": 3},
    "pretrained": {"subspace": "pretrained"},
    "tracked": {"directions": "tracked", "energy_ratio": 0.1},
    "tracked-stale-bf16": {
        **{"directions": "tracked", "energy_ratio": 0.1, "refresh_every": 3, "dtype": torch.bfloat16},
    },
    "no-sphere": {"sphere": False},
    "ridge": {"null_space": False},
    "memit": {"method": "memit", "covariance_weight": 10.0},
    "memit-history": {"method": "memit", "covariance_weight": 10.0, "history": True, "alpha": 0.8},
    "rect": {"method": "rect", "covariance_weight": 10.0},
    "rect-bf16": {"method": "rect", "covariance_weight": 10.0, "dtype": torch.bfloat16, "refresh_every": 2},
    "prune": {"method": "prune", "covariance_weight": 1e-3, "value_clamp": 400.0, "value_lr": 50.0},
    "batch": {"project": "batch", "refresh_every": 2},
    "memit-history-batch": {"method": "memit", "covariance_weight": 10.0, "history": True, "project": "batch"},
    "rect-batch-bf16": {"method": "rect", "covariance_weight": 10.0, "dtype": torch.bfloat16, "project": "batch"},
    "solve": {"project": "solve", "refresh_every": 2},
    "rect-solve": {"method": "rect", "covariance_weight": 10.0, "project": "solve"},
    "prune-solve": {
        **{"method": "prune", "covariance_weight": 1e-3, "value_clamp": 400.0, "value_lr": 50.0, "project": "solve"},
    },
    "solve-bf16": {"project": "solve", "dtype": torch.bfloat16, "subspace": "pretrained"},
    "memit-history-solve-fp64": {
        **{"method": "memit", "covariance_weight": 10.0, "history": True, "project": "solve", "dtype": torch.float64},
    },
    "prune-copies": {"method": "prune", "covariance_weight": 1e-3, "value_clamp": 400.0, "prune_in": "copies"},
    "rome": {"method": "rome", "layers": (2,), "batch_size": 2},
    "ft": {"method": "ft", "layers": (3, 4), "ft_steps": 3, "ft_lr": 1e-2},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": torch.float64, "refresh_every": 2},
    "loop": {"targets": "closed_loop", "contexts": 0},
    "loop-tracked": {"targets": "closed_loop", "contexts": 0, "directions": "tracked", "energy_ratio": 0.1},
    "loop-contexts": {"targets": "closed_loop", "refresh_every": 2, "loop_kl": 0.1},
    "loop-bf16": {"targets": "closed_loop", "contexts": 0, "dtype": torch.bfloat16, "project": "solve"},
    "loop-memit-history": {
        **{"targets": "closed_loop", "method": "memit", "covariance_weight": 0.1, "history": True, "modules": "up"},
    },
    "loop-rect": {"targets": "closed_loop", "method": "rect", "covariance_weight": 0.1, "subspace": "pretrained"},
    "loop-prune": {"targets": "closed_loop", "method": "prune", "covariance_weight": 1e-3, "loop_step": 50.0},
}
settings = pytest.mark.parametrize("changes", _SETTINGS.values(), ids=_SETTINGS)


def _facts():
    """Fourteen: later ones edit earlier ones again."""
    return [
        dataclasses.replace(fact, target_new=fact.target_new + again, id=fact.id + again)
        for again in ("", " a", " b")
        for fact in tiny.facts(6)
    ][:14]


def _same(editor, other) -> bool:
    one, two = editor.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@settings
def test_records_lead_to_the_same_bits(changes, make):
    """By replay from the start, from a state in the middle, and back again: weights and all that follows from them."""
    facts, edited, half = _facts(), make(**changes), make(**changes)
    records = edited.edit(facts).records
    assert [record.number for record in records] == list(range(1, 8))
    assert [i for record in records for i in record.requests] == [fact.id for fact in facts]
    half.edit(facts[:8])
    state = {name: value.clone() for name, value in half.state_dict().items()}

    replayed, loaded, mixed = make(**changes), make(**changes), make(**changes)
    for record in records:
        replayed.replay(record)
    assert _same(replayed, edited)
    loaded.load_state_dict(state)
    assert loaded.batches == 4 and loaded.edits == 8
    loaded.edit(facts[8:])
    assert _same(loaded, edited)
    mixed.load_state_dict(state)
    mixed.replay(records[4])
    mixed.edit(facts[10:])
    assert _same(mixed, edited) and tiny.same(mixed.model, tiny.state(edited.model))
    edited.rewind(records[:4])
    assert _same(edited, half) and tiny.same(edited.model, tiny.state(half.model))


def test_events_say_how_tracked_directions_came_about(make):
    found = {}
    for how in ("exact", "tracked"):
        records = make(directions=how, energy_ratio=0.1).edit(_facts()).records
        found[how] = [event for record in records for event in record.events if event["event"] == "energy"]
    assert not any("directions" in event or "energy_bound" in event for event in found["exact"])
    came = [event["directions"] for event in found["tracked"]]
    assert came[:3] == ["start"] * 3 and set(came[3:]) <= {"tracked", "short"}
    assert came.count("tracked") >= 12
    for event in found["tracked"]:
        assert 0.1 < event["energy_ratio"] <= event["energy_bound"] <= 1 and event["rank"] >= 1


def test_records_can_be_handed_over(make):
    taken, other = [], make()
    editor = make(on_batch=taken.append)
    result = editor.edit(tiny.facts(6))
    assert len(taken) == 3 and result.records == [] and result.updates == {}
    for record, own in zip(taken, other.edit(tiny.facts(6)).records, strict=True):
        for layer, done in record.layers.items():
            assert done.sha256 == own.layers[layer].sha256
            assert all(x.dtype == torch.float32 for x in (done.keys, done.update.left, done.update.right))
        kinds = [event["event"] for event in record.events]
        assert kinds == ["energy"] * 3 + ["batch"]


def test_replay_refuses_what_is_not_the_next_batch_here(make):
    editor, other = make(), make(layers=(1, 2))
    first, second = editor.edit(tiny.facts(4)).records
    fresh = make()
    before = tiny.state(fresh.model)
    with pytest.raises(ReplayError, match=r"batch 2 .* cannot follow batch 0"):
        fresh.replay(second)
    with pytest.raises(ReplayError, match=r"layers \[1, 2, 3\] cannot follow .* \[1, 2\]"):
        other.replay(first)
    taken = first.layers[2].update
    bits = taken.right.clone()
    bits[0, 0] += 1e-4
    altered = {**first.layers, 2: dataclasses.replace(first.layers[2], update=LowRankUpdate(taken.left, bits))}
    with pytest.raises(ReplayError, match=r"layer 2: .* SHA-256"):
        fresh.replay(dataclasses.replace(first, layers=altered))
    assert tiny.same(fresh.model, before) and fresh.batches == 0
    fresh.replay(first)
    fresh.replay(second)
    assert _same(fresh, editor)


def test_state_of_another_editor_is_refused(make):
    state = make(layers=(1, 2)).state_dict()
    editor = make()
    before = tiny.state(editor.model)
    with pytest.raises(ValueError, match="state must hold"):
        editor.load_state_dict(state)
    assert tiny.same(editor.model, before)


def test_fingerprints_say_what_the_edits_rest_on(make, monkeypatch):
    one, same, other = make(), make(), make(contexts=0)
    assert one.fingerprints() == same.fingerprints()
    assert set(one.fingerprints()) == {
        "model",
        "tokenizer",
        "contexts",
        "covariance.1",
        "covariance.2",
        "covariance.3",
    }
    changed = {name for name, value in other.fingerprints().items() if value != one.fingerprints()[name]}
    assert changed == {"contexts"}
    one.edit(tiny.facts(2))
    assert one.fingerprints() == same.fingerprints()  # of the model as found
    moved = make()
    with torch.no_grad():
        moved.model.get_output_embeddings().weight[0, 0] += 1
    assert moved.fingerprints()["model"] != same.fingerprints()["model"]


def test_interrupt_while_the_history_grows_is_not_passed_over(make, monkeypatch):
    """Some layers' histories then have the batch and some have not: only a state or the beginning leads on."""
    editor, undisturbed = make(), make()
    editor.edit(tiny.facts(2))
    state = {name: value.clone() for name, value in editor.state_dict().items()}

    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(editor._engine.method), "commit", cut)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(tiny.facts(4)[2:])
    with pytest.raises(RuntimeError, match=r"revert\(\) or load_state_dict\(\)"):
        editor.edit(tiny.facts(4)[2:])
    editor.load_state_dict(state)
    editor.edit(tiny.facts(4)[2:])
    undisturbed.edit(tiny.facts(4))
    assert _same(editor, undisturbed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_are_the_rounded_master(dtype, make):
    editor = make(dtype=dtype)
    records = editor.edit(_facts()).records
    for layer, weight in editor.weights().items():
        exact = editor.original_weights()[layer].double()
        for record in records:
            done = record.layers[layer]
            exact += done.update.left.double() @ done.update.right.double()
        master = editor.state_dict()[f"engine.weight.{layer}.master"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master.double(), exact, atol=1e-5, rtol=1e-5)
        assert torch.equal(weight, master.to(dtype))


def test_keys_after_all_layers_are_those_solved_with(family, make):
    """Published code computes the keys of the history anew; a layer's keys depend on lower layers only."""
    editor = make(family=family)
    facts = tiny.facts(2)
    (record,) = editor.edit(facts).records
    with frozen(editor.model):
        walk = LayerPass(
            editor.model, editor.tokenizer, editor.structure, facts, editor._writer.contexts, editor.config.layers
        )
        for layer in editor.config.layers:
            walk.advance(layer)
            torch.testing.assert_close(walk.keys(), record.layers[layer].keys, atol=1e-5, rtol=1e-5)
    assert all(float((done.update.left @ done.update.right).norm()) > 1e-3 for done in record.layers.values())


def test_memit_keeps_no_history(make):
    editor = make(method="memit", covariance_weight=10.0, alpha=0.8)
    assert len(editor.edit(_facts()).records) == 7
    assert not any(name.startswith("engine.method") for name in editor.state_dict())


def test_memit_needs_a_whole_covariance(make, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Too short a text for eighty features.", encoding="utf-8")
    editor = make(method="memit", covariance_text=str(text))
    with pytest.raises(ValueError, match=r"layer 1: covariance .* positive definite .* covariance_tokens"):
        editor.edit(tiny.facts(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_no_longer_the_editors_are_noticed(dtype, make):
    """A cast there and back leaves new storage: edits would go nowhere."""
    editor = make(dtype=dtype)
    editor.edit(tiny.facts(2))
    editor.model.double().to(dtype)
    with pytest.raises(ValueError, match=r"layer 1: .* make a new editor"):
        editor.edit(tiny.facts(4)[2:])


def test_sixteen_bit_weights_written_from_outside_are_noticed(make):
    editor = make(dtype=torch.bfloat16)
    editor.edit(tiny.facts(2))
    with torch.no_grad():
        editor.weights()[2].copy_(editor.original_weights()[2])
    with pytest.raises(ValueError, match=r"layer 2: .* make a new editor"):
        editor.edit(tiny.facts(4)[2:])


def test_a_state_that_is_refused_breaks_nothing(make):
    editor, undisturbed = make(), make()
    editor.edit(tiny.facts(2))
    for state in ({}, make(layers=(1, 2)).state_dict()):
        with pytest.raises(ValueError, match="state must hold"):
            editor.load_state_dict(state)
    editor.edit(tiny.facts(4)[2:])
    undisturbed.edit(tiny.facts(4))
    assert _same(editor, undisturbed)


def test_short_ridge_takes_a_wider_history(make):
    states = [make(ridge=ridge).state_dict() for ridge in (10.0, 1e-6)]
    found = [{value.dtype for name, value in state.items() if name.endswith("dual")} for state in states]
    assert found == [{torch.float32}, {torch.float64}]
