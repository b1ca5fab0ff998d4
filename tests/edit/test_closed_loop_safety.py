"""What the closed loop promises when things go wrong, and beside other editors: the bits are those of before, or alone.

Records, replays, states and rewinds of its batches are in ``test_engine.py``.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.editing.engine import Engine
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments.run import resume
from sphere_edit.model.structure import StructureError, find_structure
from sphere_edit.runs.deltas import switch, write_deltas
from sphere_edit.runs.spec import RunOptions
from sphere_edit.targets.passes import Passes
from sphere_kernels.streaming import HypersphereState

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of")

LOOP = tiny.CONFIG.replace(targets="closed_loop", contexts=0, loop_arithmetic="model", loop_rounds=4)
models = pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", torch.float32, {}),
        ("gpt2", torch.bfloat16, {"contexts": 2, "loop_kl": 0.1}),
        ("llama", torch.float32, {"loop_arithmetic": "bfloat16"}),
    ],
    ids=["llama", "gpt2-bf16-contexts-kl", "llama-rounds-in-bf16"],
)


@pytest.fixture
def config():
    return LOOP


def _cut(monkeypatch, owner, name, call, error, after):
    """The ``call``-th call of a function is cut short, ``after`` what it does or before."""
    calls, original = [], getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise error("cut")
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise error("cut")
        return result

    monkeypatch.setattr(owner, name, failing)
    return calls


# Per batch of four rounds on three layers: four passes and attempts, twelve updates tried, three written.
_PLACES = [
    *((Passes, "run", call, False) for call in (1, 2, 4)),
    *((Engine, "attempt", call, after) for call in (1, 3, 4) for after in (False, True)),
    *((HypersphereState, "updated", call, False) for call in (1, 2, 6, 12)),
    *((Passes, "follow", call, True) for call in (1, 2, 5)),
    *((HypersphereState, "update_", call, after) for call in (1, 3) for after in (False, True)),
    (Engine, "settle", 1, False),
    (Engine, "settle", 1, True),
]
_IDS = [f"{owner.__name__}.{name} {call} {'after' if after else 'before'}" for owner, name, call, after in _PLACES]


@pytest.fixture(scope="module")
def after_a_batch(tokenizer, tmp_path_factory):
    """By settings an editor after its first batch, made once and put back, and the weights that an editor which nothing
    disturbs has after three."""
    made = {}

    def build(family="llama", dtype=torch.float32, changes=()):
        settings = LOOP.replace(loop_stop=1e-6, **dict(changes))
        if (key := (family, dtype, settings)) not in made:
            cache = tmp_path_factory.mktemp("covariance")
            models = [tiny.make_model(family, dtype=dtype) for _ in range(2)]
            editor, undisturbed = (SphereEditor(model, tokenizer, settings, cache=cache) for model in models)
            editor.edit(tiny.facts(2))
            undisturbed.edit(tiny.facts(6))
            state = {name: value.clone() for name, value in editor.state_dict().items()}
            made[key] = editor, state, tiny.state(undisturbed.model)
        editor, state, end = made[key]
        editor.load_state_dict({name: value.clone() for name, value in state.items()})
        return editor, end

    return build


@pytest.mark.parametrize(("owner", "name", "call", "after"), _PLACES, ids=_IDS)
@models
def test_a_batch_cut_short_is_undone(family, dtype, changes, owner, name, call, after, after_a_batch, monkeypatch):
    """Anywhere in the second batch; then it goes on as if nothing had been."""
    error = (KeyboardInterrupt, RuntimeError, SystemExit)[call % 3]
    editor, end = after_a_batch(family, dtype, changes)
    before = tiny.state(editor.model)
    with monkeypatch.context() as patch:
        calls = _cut(patch, owner, name, call, error, after)
        with pytest.raises(error, match="cut"):
            editor.edit(tiny.facts(4)[2:])
    assert len(calls) == call
    assert tiny.same(editor.model, before) and (editor.batches, editor.edits) == (1, 2)
    assert all(p.requires_grad for p in editor.model.parameters())
    assert not any(module._forward_hooks for module in editor.model.modules())
    editor.edit(tiny.facts(6)[2:])
    assert tiny.same(editor.model, end)


@pytest.mark.parametrize("round_number", [1, 2, 3, 4])
def test_progress_may_interrupt_any_round(round_number, after_a_batch):
    editor, end = after_a_batch()
    before, heard = tiny.state(editor.model), []

    def listen(what, done, total):
        heard.append((what, done, total))
        if heard.count(("facts", 0, 2)) == round_number:
            raise KeyboardInterrupt

    editor._on_progress = listen
    with pytest.raises(KeyboardInterrupt):
        editor.edit(tiny.facts(4)[2:])
    assert tiny.same(editor.model, before)
    editor._on_progress = lambda *_: None
    editor.edit(tiny.facts(6)[2:])
    assert tiny.same(editor.model, end)


@models
def test_interleaved_editors_do_not_meet(family, dtype, changes, make):
    others = {"seed": 3, "alpha": 0.9, "loop_momentum": 0.7}
    alone = [make(family, dtype, **changes), make("gpt2", **others), make(family, dtype, **changes | {"modules": "up"})]
    mixed = [make(family, dtype, **changes), make("gpt2", **others), make(family, dtype, **changes | {"modules": "up"})]
    for editor in alone:
        editor.edit(tiny.facts(6))
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        for editor in mixed:
            editor.edit(tiny.facts(6)[part])
    for a, b in zip(alone, mixed, strict=True):
        assert tiny.same(b.model, tiny.state(a.model))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(stop, tokenizer, tmp_path, monkeypatch):
    """Contexts are drawn in every round; checkpoints and replayed batches are gone on from alike."""
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))
    settings = LOOP.replace(contexts=2, refresh_every=2, loop_kl=0.1)
    facts, text = tiny.places(8), tmp_path / "text.txt"
    text.write_text("Nobody saw the river in the night. " * 12)

    def run(out, interrupt=None):
        options = RunOptions("tiny", "facts", out, perplexity_text=str(text), perplexity_tokens=100, checkpoint_every=2)
        experiment.run(tiny.make_model("llama"), tokenizer, facts, settings, options, interrupt)

    def interrupt(event):
        if event["event"] == "batch" and event["batch"] == stop:
            raise KeyboardInterrupt

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", interrupt)
    resume(tiny.make_model("llama"), tokenizer, tmp_path / "stopped")
    names = [path.relative_to(tmp_path / "whole") for path in sorted((tmp_path / "whole" / "batches").iterdir())]
    assert len(names) == 4
    for name in (*names, "deltas.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


_LLAMA = {"up": "model.layers.{}.mlp.up_proj", "gate": "model.layers.{}.mlp.gate_proj"}
_MAPS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "cohere", "granite"), _LLAMA),
    "phi3": {"fused": "model.layers.{}.mlp.gate_up_proj"},
    "phi": {"up": "model.layers.{}.mlp.fc1"},
    "gpt2": {"up": "transformer.h.{}.mlp.c_fc"},
    "gptj": {"up": "transformer.h.{}.mlp.fc_in"},
    "gptneox": {"up": "gpt_neox.layers.{}.mlp.dense_h_to_4h"},
    "opt": {"up": "model.decoder.layers.{}.fc1"},
    "falcon": {"up": "transformer.h.{}.mlp.dense_h_to_4h"},
    "bloom": {"up": "transformer.h.{}.mlp.dense_h_to_4h"},
    "mpt": {"up": "transformer.blocks.{}.ffn.up_proj"},
}


@pytest.mark.parametrize("family", _MAPS)
def test_maps_are_found_by_structure(family):
    model = tiny.make_model(family)
    before = tiny.state(model)
    for kind in ("up", "gate", "fused"):
        if kind in _MAPS[family]:
            found = find_structure(model, kind)
            assert [m.name for m in found.edited] == [_MAPS[family][kind].format(i) for i in range(5)]
            assert all(m.module is model.get_submodule(m.name) for m in found.edited)
            assert found.modules == kind and found.down == find_structure(model).down
        else:
            has = ", ".join(["down", *sorted(_MAPS[family], reverse=True)])
            with pytest.raises(StructureError, match=f"no map of the kind '{kind}'; expected modules of {has}$"):
                find_structure(model, kind)
    assert tiny.same(model, before) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in ("llama", "gpt2", "phi3", "opt") for k in _MAPS[f]])
def test_maps_are_edited_reverted_and_their_deltas_applied(family, kind, dtype, make, tmp_path):
    editor = make(family, dtype, modules=kind, loop_rounds=2, ridge=1e-5, null_space_threshold=10.0, loop_step=10.0)
    before, names = tiny.state(editor.model), {m.layer: m.name for m in editor.structure.edited}
    events = editor.edit(tiny.facts(4)).events
    after = tiny.state(editor.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{_MAPS[family][kind].format(i)}.weight" for i in (1, 2, 3)}
    assert len([e for e in events if e["event"] == "energy" and e["batch"] == 2]) == 3
    edited = {layer: names[layer] for layer in editor.config.layers}
    write_deltas(tmp_path, edited, editor.original_weights(), editor.weights(), "tiny")
    fresh = tiny.make_model(family, dtype=dtype)
    switch(tmp_path, find_structure(fresh, kind), "after")
    assert tiny.same(fresh, after)
    switch(tmp_path, find_structure(fresh, kind), "before")
    assert tiny.same(fresh, before)
    editor.revert()
    assert tiny.same(editor.model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"project": "batch"},
            r"project: closed_loop targets solve for all layers .* expected 'layer' or 'solve', got 'batch'",
        ),
        (
            {"targets": "optimised", "modules": "up"},
            r"modules: optimised values .* expected 'down', or other targets, got 'up'",
        ),
        ({"modules": "all"}, r"modules: expected one of down, up, gate, fused, got 'all'"),
        ({"targets": "loop"}, r"targets: expected one of optimised, closed_loop, .* got 'loop'"),
        (
            {"targets": "optimised", "loop_rounds": 3},
            r"loop_rounds: only closed_loop targets have a use for it, .* got 3",
        ),
        ({"value_steps": 3}, r"value_steps: only optimised targets have a use for it, .* got 3"),
        ({"loop_rounds": 0}, r"loop_rounds: expected a whole number of at least 1, got 0"),
        ({"loop_kl": -1.0}, r"loop_kl: expected a number of at least 0, got -1.0"),
        ({"loop_momentum": 1.5}, r"loop_momentum: expected a number from 0 to 1, got 1.5"),
        ({"loop_arithmetic": "int8"}, r"loop_arithmetic: expected one of auto, model, bfloat16, got 'int8'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        EditConfig(**settings)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "gate"), ("phi3", "up"), ("llama", "fused")])
def test_a_map_that_is_not_there_is_refused_before_anything(family, kind, tokenizer):
    model = tiny.make_model(family)
    before = tiny.state(model)
    with pytest.raises(StructureError, match=f"its MLP has no map of the kind '{kind}'"):
        SphereEditor(model, tokenizer, LOOP.replace(modules=kind))
    assert tiny.same(model, before)
