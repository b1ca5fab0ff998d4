"""What the editor promises when things go wrong: a batch is written whole or not at all, and nothing else changes."""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.data.requests import EditRequest, RequestError
from sphere_edit.editing import editor as module
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.model.structure import StructureError
from sphere_kernels.streaming import HypersphereState

families = pytest.mark.parametrize("family", ["llama", "gpt2"])
_GOOD = {"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Rome"}


@families
def test_revert_is_exact_and_forgets(family, make):
    editor, fresh = make(family), make(family)
    before = tiny.state(editor.model)
    editor.edit(tiny.facts(4))
    assert not tiny.same(editor.model, before)
    editor.revert()
    assert tiny.same(editor.model, before)
    again, first = editor.edit(tiny.facts(3)), fresh.edit(tiny.facts(3))
    assert tiny.same(editor.model, tiny.state(fresh.model))
    assert [e["event"] for e in again.events] == [e["event"] for e in first.events]
    assert [e["edits"] for e in again.events if "edits" in e] == [e["edits"] for e in first.events if "edits" in e]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@families
def test_other_dtypes(family, dtype, make):
    plain, editor = make(family), make(family, dtype)
    before = tiny.state(editor.model)
    result = editor.edit(tiny.facts(4))
    plain.edit(tiny.facts(4))
    for layer, weight in editor.weights().items():
        assert weight.dtype == dtype
        moved = (weight - editor.original_weights()[layer]).float()
        assert torch.isfinite(moved).all() and moved.abs().max() > 0
        assert all(u.left.dtype == u.right.dtype == torch.float32 for u in result.updates[layer])
        if dtype == torch.float64:
            want = plain.weights()[layer] - plain.original_weights()[layer]
            torch.testing.assert_close(moved, want, atol=1e-3, rtol=1e-2)
    editor.revert()
    assert tiny.same(editor.model, before)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 3])
@families
def test_interrupted_batch_is_undone(family, call, error, make, monkeypatch):
    """The second batch is cut short after ``call - 1`` of its layers were written, the third layer's even half."""
    editor, undisturbed = make(family), make(family)
    editor.edit(tiny.facts(2))
    before, calls, update = tiny.state(editor.model), [], HypersphereState.update_

    def failing(state, left, right):
        calls.append(1)
        if len(calls) == call:
            state.weight[0] += 1.0
            state.gram[0] += 1.0
            raise error("cut")
        update(state, left, right)

    with monkeypatch.context() as patch:
        patch.setattr(HypersphereState, "update_", failing)
        with pytest.raises(error):
            editor.edit(tiny.facts(4)[2:])
    assert len(calls) == call
    assert tiny.same(editor.model, before)
    assert all(p.requires_grad for p in editor.model.parameters())
    editor.edit(tiny.facts(6)[2:])
    undisturbed.edit(tiny.facts(6))
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


def test_batch_that_cannot_be_recorded_is_undone(make):
    editor, undisturbed = make(), make()
    editor.edit(tiny.facts(2))
    before = tiny.state(editor.model)

    def refuse(record):
        assert not tiny.same(editor.model, before)
        raise OSError("disk full")

    editor._on_batch, heard = refuse, []
    editor.on_event = heard.append
    with pytest.raises(OSError, match="disk full"):
        editor.edit(tiny.facts(4)[2:])
    assert tiny.same(editor.model, before) and not heard
    editor._on_batch = None
    editor.edit(tiny.facts(4)[2:])
    undisturbed.edit(tiny.facts(4))
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


@pytest.mark.parametrize("where", ["energy", "batch"])
def test_batch_outlives_a_failing_listener(where, make):
    """What is heard of a batch is heard once it is final."""
    editor, undisturbed = make(), make()
    editor.edit(tiny.facts(2))

    def listen(event):
        if event["event"] == where and event.get("layer", 3) == 3:
            raise OSError("no one there")

    editor.on_event = listen
    with pytest.raises(OSError, match="no one there"):
        editor.edit(tiny.facts(4)[2:])
    editor.on_event = lambda event: None
    assert editor.batches == 2 and editor.edits == 4
    editor.edit(tiny.facts(6)[4:])
    undisturbed.edit(tiny.facts(6))
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


def test_earlier_batches_of_an_interrupted_call_stay(make):
    editor, two = make(), make()
    two.edit(tiny.facts(2))

    def stop(what, done, total):
        if (what, done) == ("batches", 1):
            raise KeyboardInterrupt

    editor._on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        editor.edit(tiny.facts(6))
    assert tiny.same(editor.model, tiny.state(two.model))


def test_failing_preparation_can_be_repeated(make, monkeypatch):
    editor, undisturbed = make(), make()
    before = tiny.state(editor.model)
    with monkeypatch.context() as patch:
        patch.setattr(module, "key_covariances", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)
    events = editor.edit(tiny.facts(2)).events
    undisturbed.edit(tiny.facts(2))
    assert events[0]["event"] == "prepared"
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


def test_update_that_is_not_finite_is_not_written(make, monkeypatch):
    editor = make()
    editor.edit(tiny.facts(2))
    before = tiny.state(editor.model)
    solve = editor._engine.method.solve

    def broken(layer, keys, residuals):
        update = solve(layer, keys, residuals)
        if layer == 2:
            update.right[0, 0] = float("inf")
        return update

    monkeypatch.setattr(editor._engine.method, "solve", broken)
    with pytest.raises((FloatingPointError, ValueError), match="NaN|Inf|finite"):
        editor.edit(tiny.facts(4)[2:])
    assert tiny.same(editor.model, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**_GOOD, "prompt": "The capital is"}, r"exactly one \{\}"),
        ({**_GOOD, "prompt": "{} and {}"}, "got 2"),
        ({**_GOOD, "prompt": ""}, "prompt is empty"),
        ({**_GOOD, "subject": " "}, "subject is empty"),
        ({**_GOOD, "target_new": ""}, "target_new is empty"),
        ({**_GOOD, "target_new": 7}, "target_new must be text, got int 7"),
        ({**_GOOD, "target_true": " "}, "target_true must be non-empty"),
        ({**_GOOD, "paraphrases": "one"}, "paraphrases must be a list"),
        ({**_GOOD, "neighborhood": ["ok", 3]}, "neighborhood must be a list"),
        ({**_GOOD, "relation": 3}, "relation must be text"),
        ({**_GOOD, "targte": "x"}, "unknown field 'targte'"),
        ({"prompt": "{} is", "subject": "x"}, "'target_new' is missing"),
        ("Peru", "expected an EditRequest or a dict, got str"),
        (None, "got NoneType"),
    ],
)
def test_bad_request_changes_nothing(bad, message, make):
    editor = make()
    before, heard = tiny.state(editor.model), []
    editor.on_event = heard.append
    for call in (editor.edit, editor.check):
        with pytest.raises(RequestError, match=message):
            call([*tiny.facts(3), bad])
    assert tiny.same(editor.model, before) and not heard


def test_contradictory_batch_changes_nothing(make):
    editor = make(batch_size=3)
    before = tiny.state(editor.model)
    other = EditRequest("the  capital of {} is", "vanuatu", "Oslo", id="other")
    with pytest.raises(RequestError, match="batch 0 .*'capital' and 'other' contradict"):
        editor.edit([*tiny.facts(2), other])
    assert tiny.same(editor.model, before)
    editor.edit([*tiny.facts(3), other])  # in the next batch it is an edit of the edit
    assert not tiny.same(editor.model, before)


def test_same_fact_twice_in_a_batch(make):
    editor = make()
    editor.edit([tiny.facts(1)[0], tiny.facts(1)[0]])
    assert all(torch.isfinite(w).all() for w in editor.weights().values())


def test_requests_in_any_form(make):
    editors = make(), make(), make()
    fields = [{k: v for k, v in vars(r).items() if v is not None} for r in tiny.facts(3)]
    editors[0].edit(tiny.facts(3))
    editors[1].edit(fields)
    editors[2].edit(f for f in [tiny.facts(1)[0], *fields[1:]])
    assert tiny.same(editors[0].model, tiny.state(editors[1].model))
    assert tiny.same(editors[0].model, tiny.state(editors[2].model))


def test_nothing_to_edit(make):
    editor = make()
    before = tiny.state(editor.model)
    result = editor.edit([])
    assert tiny.same(editor.model, before)
    assert result.requests == [] and result.events == [] and result.updates == {}


def test_missing_text_is_found_before_editing(make):
    editor = make(covariance_text="/nowhere/text.txt")
    with pytest.raises(FileNotFoundError, match="/nowhere/text.txt"):
        editor.check(tiny.facts(1))


def _nan(model):
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": (3, 4)}, StructureError, "last block"),
        ({"layers": (2, 9)}, StructureError, "out of range"),
        ({"method": "memo"}, ConfigError, "alphaedit"),
    ],
)
def test_settings_that_do_not_fit(changes, error, message, make):
    with pytest.raises(error, match=message):
        make(**changes)


def test_bad_model_tokenizer_or_preset(tokenizer, config):
    model = tiny.make_model("llama")
    before = tiny.state(model)
    with pytest.raises(ValueError, match="no character offsets"):
        SphereEditor(model, type("Slow", (), {"is_fast": False})(), config)
    with pytest.raises(ConfigError, match="preset 'llama9' is not known"):
        SphereEditor(model, tokenizer, "llama9")
    assert tiny.same(model, before)
    _nan(model)
    with pytest.raises(StructureError, match="q_proj.weight .* holds NaN"):
        SphereEditor(model, tokenizer, EditConfig())


@families
def test_model_flags_are_as_before(family, make):
    editor = make(family)
    model = editor.model
    model.train()
    frozen_one = next(model.parameters())
    frozen_one.requires_grad_(False)
    wants = [p.requires_grad for p in model.parameters()]
    cached = model.config.use_cache
    editor.edit(tiny.facts(2))
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert model.config.use_cache == cached
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_cast_after_the_editor_was_made_is_refused(make):
    editor = make("llama")
    editor.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="make a new editor"):
        editor.edit(tiny.facts(1))


def test_editing_inside_no_grad_and_inference_mode(make):
    with torch.no_grad():
        make("llama").edit(tiny.facts(1))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        make("llama").edit(tiny.facts(1))


def test_a_fact_too_long_for_the_model_is_refused_before_the_first_batch(make):
    editor = make("gpt2", batch_size=1)
    before = tiny.state(editor.model)
    positions = editor.model.config.max_position_embeddings
    long = _GOOD | {"prompt": "a b c " * positions + "{} is"}
    with pytest.raises(ValueError, match=f"the model has {positions} positions"):
        editor.edit([_GOOD, long])
    assert tiny.same(editor.model, before)


def test_a_tokenizer_of_another_model_is_refused(make):
    editor = make("llama")
    editor.model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="the model has 20 embeddings"):
        editor.check([_GOOD])


def test_a_computed_weight_is_refused(tokenizer, config):
    model = tiny.make_model("llama")
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    with pytest.raises(StructureError, match="parametrised"):
        SphereEditor(model, tokenizer, config)


@pytest.mark.parametrize("stop", [0.5, 3.0])
def test_facts_that_finish_early_where_biases_are_shared(make, tokenizer, config, tmp_path, stop):
    model = tiny.make_model("mpt")
    editor = SphereEditor(model, tokenizer, config.replace(value_stop=stop, contexts=1), cache=tmp_path / "c")
    result = editor.edit(tiny.facts(4))
    assert result.events[-1]["event"] == "batch"
