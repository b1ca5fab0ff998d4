"""A default dtype of the caller's own changes nothing, in no method and no measure."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import tiny
import torch

from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.energies import layer_energies
from sphere_edit.evaluation.metrics import evaluate, perplexity
from sphere_edit.evaluation.texts import generate_texts

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of")

_WAYS = {
    "alphaedit": {},
    "closed_loop": {"targets": "closed_loop"},
    "gradient": {"targets": "gradient"},
    "ft": {"method": "ft", "layers": (3,), "ft_lr": 0.01, "ft_steps": 4},
    "memit": {"method": "memit", "covariance_weight": 1e-3},
    "rome": {"method": "rome", "layers": (2,)},
    "prune": {"method": "prune", "covariance_weight": 1e-3},
    "rect": {"method": "rect", "covariance_weight": 1e-3},
}


@contextmanager
def _default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _edited(model, tokenizer, config, cache):
    model = copy.deepcopy(model)
    editor = SphereEditor(model, tokenizer, config, cache=cache)
    events = editor.edit(tiny.facts(2)).events
    measured = [e for e in events if e["event"] == "energy"]
    return tiny.state(model), measured, editor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", _WAYS)
def test_edits_are_the_same_bit_for_bit(way, dtype, tokenizer, config, tmp_path):
    model, changes = tiny.make_model("llama"), _WAYS[way]
    if "method" in changes:
        changes = {"null_space_threshold": 2e-2, "ridge": 10.0} | changes
    config = config.replace(**changes)
    state, measured, _ = _edited(model, tokenizer, config, tmp_path / "one")
    with _default(dtype):
        again, measured_again, editor = _edited(model, tokenizer, config, tmp_path / "other")
        editor.revert()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert measured == measured_again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_measures_are_the_same(dtype, tokenizer):
    model, facts = tiny.make_model("qwen2"), tiny.facts(3)

    def measure():
        texts = generate_texts(model, tokenizer, facts, length=40)
        scores = evaluate(model, tokenizer, facts).to_dict()
        return scores, perplexity(model, tokenizer, tokens=600), layer_energies(model), texts

    want = measure()
    with _default(dtype):
        assert measure() == want
