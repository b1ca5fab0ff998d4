"""A model takes the same edits whatever form its function is written in."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from benchmarks.models.forms import FORMS
from benchmarks.models.twins import blocks_of, twin
from sphere_edit.editing import batch as module
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.targets import passes

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of", "ignore:batch")

_IDS = torch.arange(5, 17).view(2, 6)
_TOWNS = tiny.towns(20)
_WITH_RECURRENCES = ("falcon_h1",)


@pytest.fixture(scope="module")
def originals():
    """A tiny Llama and a tiny Arcee that know 24 towns, each trained once."""
    tokenizer, made = tiny.make_tokenizer(), {}

    def get(name):
        if name not in made:
            made[name] = tiny.train(tiny.make_model(name, tie_word_embeddings=True), tokenizer, tiny.towns(24))
        return copy.deepcopy(made[name])

    return get


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """What the same edits come to, each original's once: batch events, logits."""
    folder, found = tmp_path_factory.mktemp("covariances"), {}

    def get(original, *settings):
        if settings not in found:
            found[settings] = _edit(original, *settings[:3], folder / str(len(found)))
        return found[settings]

    return get


@torch.no_grad()
def _logits(model):
    return model(_IDS).logits


def _edit(model, family, config, tokenizer, cache):
    """(batch events, logits) of two batches with the null space and SPHERE."""
    editor = SphereEditor(model, tokenizer, config.replace(layers=blocks_of(family, config.layers)), cache=cache)
    events = [event for event in editor.edit(_TOWNS).events if event["event"] == "batch"]
    return events, _logits(model)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in _WITH_RECURRENCES)) for name in FORMS]
)
def test_a_twin_takes_the_edits_of_its_original(family, originals, edited, config, tokenizer, tmp_path, monkeypatch):
    """In every form, what the loop does is the same up to rounding: nothing in it depends on how a block is built."""
    config = config.replace(targets="closed_loop").replace(contexts=0, batch_size=10, ridge=1e-3)
    config = config.replace(loop_arithmetic="model")  # in bfloat16 a multiplier is another rounding
    whole_rows = family in _WITH_RECURRENCES
    if whole_rows:  # as the twin is edited
        monkeypatch.setattr(passes, "keeps_only_keys", lambda _: False)
    kind = FORMS[family].original
    original = originals(kind)
    other, before = twin(original, family), _logits(original)
    torch.testing.assert_close(_logits(other), before, atol=1e-4, rtol=1e-4)
    events, logits = edited(original, kind, config, tokenizer, whole_rows)
    found, also = _edit(other, family, config, tokenizer, tmp_path)
    for one, two in zip(events, found, strict=True):
        assert all(one[name] == two[name] for name in ("learned", "unlearned", "rounds"))
        assert two["nll"] == pytest.approx(one["nll"], rel=1e-3)
    assert sum(event["learned"] for event in events) >= 18
    assert (logits - before).abs().max() > 1
    torch.testing.assert_close(also, logits, atol=5e-3, rtol=5e-3)


def _right(model, tokenizer):
    """How many targets, of one token each, are the likeliest after their prompts."""
    count = 0
    for fact in _TOWNS:
        prompt = tokenizer(fact.text)["input_ids"]
        (target,) = tokenizer(f"{fact.text} {fact.target_new}")["input_ids"][len(prompt) :]
        count += int(model(torch.tensor([prompt])).logits[0, -1].argmax()) == target
    return count


@pytest.mark.parametrize("same_place", [True, False])
def test_optimised_values_edit_a_twin_as_well(same_place, originals, config, tokenizer, tmp_path, monkeypatch):
    """Where both have values at their maps' outputs the steps are the same; a Llama's own way is as accurate.

    Only with a stream of the same unit: the published step is a length in it, and so is Adam's epsilon.
    """
    config = config.replace(contexts=0, ridge=1e-4, null_space=False, sphere=False, batch_size=10, value_steps=60)
    config = config.replace(value_stop=0.05, value_stop_on="nll", value_lr=0.5, value_kl=0.0)
    original = originals("llama")
    other = twin(original, "granite")
    if same_place:
        monkeypatch.setattr(module, "not_additive", lambda *_: config.layers)
    _, one = _edit(original, "llama", config, tokenizer, tmp_path / "one")
    _, two = _edit(other, "granite", config, tokenizer, tmp_path / "two")
    if same_place:
        torch.testing.assert_close(two, one, atol=0.1, rtol=0.05)
    right, also = _right(original, tokenizer), _right(other, tokenizer)
    assert right >= 18 and abs(also - right) <= 1


def test_a_form_without_a_place_for_a_part_is_refused(originals):
    with pytest.raises(
        ValueError, match=r"MistralConfig: model.layers.0.mlp.gate_proj.weight holds gate; expected parts out of"
    ):
        twin(originals("arcee"), "mistral")
