"""The closed loop against dense formulas, mutants of it, and what it promises: facts learned, known ones held."""

from __future__ import annotations

import plain
import pytest
import tiny
import torch
from dense_loop import DenseLoop

from sphere_edit.data.requests import EditRequest
from sphere_edit.editing import batch as batch_module
from sphere_edit.editing import editor as module
from sphere_edit.editing.engine import Engine
from sphere_edit.evaluation.metrics import score_targets
from sphere_edit.methods.history import WithHistory
from sphere_edit.model.inference import frozen
from sphere_edit.targets.passes import Passes
from sphere_kernels.streaming import HypersphereState

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of")

LOOP = tiny.CONFIG.replace(targets="closed_loop", contexts=0, loop_arithmetic="model")
# The edited token itself predicts the one token of the target: even random models can learn these.
EASY = [
    EditRequest("The mother tongue of {}", "Zoë Åkers", "the", id="tongue"),
    EditRequest("All that is known of {}", "Vanuatu", "in", id="known"),
    EditRequest("{}", "Mount Oka", "a", id="mount"),
]
WIDE = {"ridge": 1e-5, "null_space_threshold": 3.0, "loop_rounds": 30, "loop_step": 10.0}  # nothing is out of reach


@pytest.fixture
def config():
    return LOOP


def _compare(make, tokenizer, monkeypatch, family="llama", dtype=torch.float32, facts=None, **changes):
    """Two batches by the editor and by the dense loop: updates and weights."""
    editor, twin, covariances = make(family, dtype, **changes), make(family, dtype, **changes), {}
    monkeypatch.setattr(module, "Engine", lambda *args: covariances.update(args[1]) or Engine(*args))
    facts = facts or tiny.facts(4)
    editor.prepare()
    close = 1e-4 if dtype == torch.float64 else 2e-3
    dense = DenseLoop(twin.model, tokenizer, twin.structure, editor.config, covariances)
    for batch in (facts[:2], facts[2:]):
        (record,) = editor.edit(batch).records
        with frozen(twin.model):
            wanted = dense.edit(batch)
        for layer, delta in wanted.items():
            done = record.layers[layer]
            update, weight = done.update.left.double() @ done.update.right.double(), editor.weights()[layer]
            assert delta.norm() > 1e-3
            assert (update - delta).norm() < close * delta.norm(), "the update is not the dense one"
            assert (weight - twin.weights()[layer]).double().norm() < close * delta.norm()
    return dense


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "granite"])
def test_one_round_on_one_layer(family, make, tokenizer, monkeypatch):
    """v = −c s g/‖g‖, AlphaEdit with the history of the batch before, SPHERE's projection, the written weight."""
    dense = _compare(make, tokenizer, monkeypatch, family, layers=(2,), loop_rounds=1, ridge=1.0)
    assert len(dense.asked) == 2 and all(v.norm() > 0 for asked in dense.asked for v in asked[2])


_MORE = {
    "rounds": {"loop_rounds": 4},
    "kl": {"loop_rounds": 3, "loop_kl": 0.5},
    "up": {"loop_rounds": 3, "modules": "up"},
    "short reach": {"loop_rounds": 5, "loop_reach": 0.2, "loop_momentum": 0.9},
    "long steps": {"loop_rounds": 5, "loop_step": 8.0, "loop_reach": 8.0, "loop_momentum": 0.0},
}


@pytest.mark.parametrize("changes", _MORE.values(), ids=_MORE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_rounds_on_several_layers(family, changes, make, tokenizer, monkeypatch):
    """In fp64, where rounding does not grow over the rounds; but Gemma 2's padded attention is NaN there."""
    changes = {"layers": (1, 3), "loop_stop": 1e-6, "ridge": 1.0} | changes
    dtype = torch.float32 if family == "gemma2" else torch.float64
    dense = _compare(make, tokenizer, monkeypatch, family, dtype, **changes)
    assert len(dense.asked) == 2 * changes["loop_rounds"]


def _no_history(patch):
    patch.setattr(WithHistory, "commit", lambda method: method._solved.clear())


def _no_projection(patch):
    patch.setattr(HypersphereState, "project", lambda state, right: right.to(state.master.dtype))


def _stale_pass(patch):
    """A batch's later rounds see what its first one saw."""
    begin, run = Passes.begin, Passes.run

    def fresh(passes, *args):
        passes.first = None
        begin(passes, *args)

    def again(passes, kl=0.0):
        passes.first = passes.first or run(passes, kl)
        return passes.first

    patch.setattr(Passes, "begin", fresh)
    patch.setattr(Passes, "run", again)


def _other_keys_remembered(patch):
    """The history takes keys that are not the model's."""
    settle = Engine.settle
    patch.setattr(
        Engine, "settle", lambda engine, keys, clock: settle(engine, {k: v.flip(1) for k, v in keys.items()}, clock)
    )


@pytest.mark.parametrize("mutate", [None, _no_history, _no_projection, _stale_pass, _other_keys_remembered])
def test_a_mutant_is_caught(mutate, make, tokenizer, monkeypatch):
    changes = {"layers": (1, 3), "loop_rounds": 2, "loop_stop": 1e-6, "ridge": 0.1, "null_space_threshold": 3.0}
    arguments = (make, tokenizer, monkeypatch, "llama", torch.float64)
    if mutate is None:
        _compare(*arguments, **changes)
        return
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="the update is not the dense one"):
        _compare(*arguments, **changes)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES | tiny.UNUSUAL))
def test_every_family_learns(family, make, tokenizer):
    """As the model itself says it, whole, one row at a time."""
    editor = make(family, batch_size=3, **WIDE)
    before, said = _asked(editor.model, tokenizer)
    assert not any(said)
    (event,) = [e for e in editor.edit(EASY).events if e["event"] == "batch"]
    after, said = _asked(editor.model, tokenizer)
    assert all(said) and event["learned"] == 3 and event["unlearned"] == []
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert event["fact_nll"] == pytest.approx(after, abs=2e-3) and event["nll"] == pytest.approx(
        sum(after) / 3, abs=2e-3
    )


@torch.no_grad()
def _asked(model, tokenizer):
    """NLL of each easy fact's target, and whether it is what the model says."""
    logits = [model(torch.tensor([tokenizer(fact.text)["input_ids"]])).logits[0, -1] for fact in EASY]
    targets = [tokenizer(f"{fact.text} {fact.target_new}")["input_ids"][-1] for fact in EASY]
    nll = [-float(own.log_softmax(-1)[target]) for own, target in zip(logits, targets, strict=True)]
    return nll, [int(own.argmax()) == target for own, target in zip(logits, targets, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_known_facts_stay_as_they_are(family, make, tokenizer, monkeypatch):
    """No change is wanted of them, and what their keys map to is held."""
    facts = tiny.facts(4)
    changes = {"layers": (2,), "null_space": False, "sphere": False, "ridge": 1e-9, "loop_rounds": 6, "batch_size": 4}
    probe = make(family, torch.float64, **changes)
    nll = plain.target_nll(probe.model, tokenizer, facts).detach()
    order = nll.argsort()
    stop = float((nll[order[0]] + nll[order[1]]) / 2)
    editor = make(family, torch.float64, loop_stop=stop, **changes)
    loops, original = [], batch_module.close_loop
    monkeypatch.setattr(batch_module, "close_loop", lambda *args: loops.append(original(*args)) or loops[-1])
    key = plain.key_and_value(editor.model, tokenizer, editor.structure, facts[order[0]], "{}", 2, 2)[0]
    said = editor.weights()[2] @ key
    editor.edit(facts)
    (loop,) = loops
    wanted = loop.wanted[2]
    assert (wanted[order[0]] == 0).all() and all(wanted[i].norm() > 0.01 for i in order[1:])
    moved = editor.weights()[2] - editor.original_weights()[2]
    assert moved.norm() > 0.1
    assert (moved @ key).norm() < 1e-6 * said.norm()
    again = [f.__class__(f.prompt, f.subject, "north", f.target_true, id=f.id + "b") for f in tiny.facts(6)[4:]]
    editor.edit(again)  # the history holds it, too
    assert (editor.weights()[2] @ key - said).norm() < 1e-6 * said.norm()


_METHODS = {
    "alphaedit": {"ridge": 1e-5, "null_space_threshold": 3.0},
    "memit": {"covariance_weight": 1e-3},
    "memit-history": {"covariance_weight": 1e-3, "history": True},
    "rect": {"covariance_weight": 1e-3},
    "prune": {"covariance_weight": 1e-3},
    "prune-copies": {"covariance_weight": 1e-3, "prune_in": "copies"},
    "rome": {"layers": (2,)},
}


@pytest.mark.parametrize("sphere", [True, False], ids=["sphere", "alone"])
@pytest.mark.parametrize("name", _METHODS)
def test_every_solving_method_makes_targets_likelier(name, sphere, make, tokenizer):
    asked = [(fact.text, fact.target_new) for fact in tiny.facts(4)]
    editor = make("llama", method=name.split("-")[0], sphere=sphere, loop_rounds=10, **_METHODS[name])
    before, (unlikely, _) = tiny.state(editor.model), score_targets(editor.model, tokenizer, asked)
    editor.edit(tiny.facts(4))
    likely, _ = score_targets(editor.model, tokenizer, asked)
    assert all(b > a + 0.3 for a, b in zip(unlikely, likely, strict=True))
    editor.revert()
    assert tiny.same(editor.model, before)


_KINDS = {
    "bf16 model": {"dtype": torch.bfloat16},
    "fp16 model": {"dtype": torch.float16},
    "bf16 rounds": {"loop_arithmetic": "bfloat16"},
    "kl": {"loop_kl": 0.5},
    "contexts": {"contexts": 3, "context_length": 4},
    "contexts and kl": {"contexts": 2, "context_length": 4, "loop_kl": 0.1},
    "solve": {"project": "solve"},
}


@pytest.mark.parametrize("changes", _KINDS.values(), ids=_KINDS)
def test_variants_learn_and_are_deterministic(changes, make, tokenizer):
    """``usual`` shows that the setting is heard."""
    usual = WIDE | {"loop_rounds": 10, "loop_stop": 1e-6}
    first, second, other = make(**usual | changes), make(**usual | changes), make(**usual)
    before, _ = _asked(first.model, tokenizer)
    for editor in (first, second, other):
        editor.edit(EASY)
    after, _ = _asked(first.model, tokenizer)
    assert all(b < a - 0.3 for a, b in zip(before, after, strict=True))
    assert tiny.same(second.model, tiny.state(first.model))
    assert not all(torch.equal(first.weights()[i].float(), other.weights()[i]) for i in LOOP.layers)


def test_the_rounds_copy_is_not_what_is_reported(make, tokenizer):
    """In bfloat16 the rounds are rough; the NLL told is the model's own."""
    editor = make(loop_arithmetic="bfloat16", **WIDE)
    (event,) = [e for e in editor.edit(tiny.facts(2)).events if e["event"] == "batch"]
    now = plain.target_nll(editor.model, tokenizer, tiny.facts(2))
    torch.testing.assert_close(torch.tensor(event["fact_nll"]), now.float(), atol=1e-4, rtol=1e-4)
