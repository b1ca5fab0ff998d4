"""Every family edited and measured: tied or not, with BOS or without, padding on either side, in both dtypes.

Each family takes two combinations of these four options, opposite to each other, so that it meets each option both
ways; over all families every combination occurs.
"""

from __future__ import annotations

import math
from itertools import product

import plain
import pytest
import tiny
import torch

from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.metrics import METRICS, evaluate, score_targets
from sphere_edit.methods import METHODS
from sphere_edit.targets import optimised, passes

pytestmark = pytest.mark.filterwarnings("ignore:the key covariance of")

_VALUES = (("untied", "tied"), ("plain", "bos"), ("right", "left"), ("float32", "bfloat16"))
_CASES = [
    (family, *(values[bits >> k & 1] for k, values in enumerate(_VALUES)))
    for i, family in enumerate(sorted(tiny.FAMILIES))
    for bits in (i % 8, 15 - i % 8)
]
# The subject of the first ends the prompt: its edited token itself predicts the target.
_FACTS = [tiny.facts(4)[3], tiny.facts(4)[0]]
_ASKED = [(fact.text, fact.target_new) for fact in _FACTS]


def test_every_combination_occurs():
    assert {case[1:] for case in _CASES} == set(product(*_VALUES))


@pytest.mark.parametrize(("family", "head", "special", "side", "dtype"), _CASES)
def test_a_family_is_edited_and_measured(family, head, special, side, dtype, config, tmp_path):
    model = tiny.make_model(family, dtype=getattr(torch, dtype), tie_word_embeddings=head == "tied")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (head == "tied")
    tok = tiny.make_tokenizer(bos=special == "bos")
    tok.padding_side = side
    config = config.replace(value_steps=15, contexts=0, ridge=1e-5, null_space_threshold=3.0)
    editor, before = SphereEditor(model, tok, config, cache=tmp_path / "covariance"), tiny.state(model)
    first, (unlikely, _) = evaluate(model, tok, _FACTS), score_targets(model, tok, _ASKED)
    events = editor.edit(_FACTS).events
    second, (likely, _) = evaluate(model, tok, _FACTS), score_targets(model, tok, _ASKED)

    assert likely[0] > unlikely[0] + 0.3
    exact = dtype == "float32"
    close = 2e-4 if exact else 0.1
    torch.testing.assert_close(-torch.tensor(likely), plain.target_nll(model, tok, _FACTS).float(), atol=close, rtol=0)
    tok.padding_side = {"left": "right", "right": "left"}[side]
    again = evaluate(model, tok, _FACTS)
    assert (again.to_dict(), again.per_request) == (second.to_dict(), second.per_request)
    assert score_targets(model, tok, _ASKED)[0] == likely
    for found in (first, second):
        scores = found.scores
        assert [scores[f"{name}_accuracy"].n for name in METRICS] == [2, 1, 1]
        assert [scores[f"{name}_success"].n for name in METRICS] == [1, 1, 1]
        assert all(0 <= score.mean <= 1 for score in scores.values() if score.n)

    energies = {(e["batch"], e["layer"]): e for e in events if e["event"] == "energy"}
    assert sorted(energies) == [(batch, layer) for batch in (0, 1) for layer in config.layers]
    assert all(math.isfinite(value) for event in energies.values() for name, value in event.items() if name != "event")
    for layer in config.layers:
        for batch, weight in ((0, editor.original_weights()[layer]), (1, editor.weights()[layer])):
            assert energies[batch, layer]["energy"] == pytest.approx(plain.energy(weight), rel=1e-6 if exact else 1e-4)
        assert energies[0, layer]["energy"] != energies[1, layer]["energy"]

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{tiny.FAMILIES[family][2].format(layer)}.weight" for layer in config.layers}
    editor.revert()
    assert tiny.same(model, before)


@pytest.mark.parametrize("targets", ["optimised", "closed_loop", "gradient"])
@pytest.mark.parametrize("family", [*tiny.HYBRID, *tiny.WITH_IMAGES, "olmo", "nanochat"])
def test_dense_mlps_of_other_architectures_are_edited(family, targets, tokenizer, config, tmp_path):
    model = tiny.make_model(family)
    steps = {"value_steps": 15} if targets == "optimised" else {}
    config = config.replace(targets=targets, contexts=0, ridge=1e-5, null_space_threshold=3.0, **steps)
    editor, before = SphereEditor(model, tokenizer, config, cache=tmp_path), tiny.state(model)
    unlikely, _ = score_targets(model, tokenizer, _ASKED)
    editor.edit(_FACTS)
    likely, _ = score_targets(model, tokenizer, _ASKED)
    assert sum(likely) > sum(unlikely) + (0.01 if targets == "gradient" else 0.3)
    torch.testing.assert_close(
        -torch.tensor(likely), plain.target_nll(model, tokenizer, _FACTS).float(), atol=2e-4, rtol=0
    )
    path = (tiny.HYBRID | tiny.WITH_IMAGES | tiny.UNUSUAL)[family][2]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path.format(layer)}.weight" for layer in config.layers}
    editor.revert()
    assert tiny.same(model, before)


@pytest.mark.parametrize("targets", ["optimised", "closed_loop"])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2-hard"])
def test_whole_rows_give_what_cached_prefixes_give(family, targets, tokenizer, config, tmp_path, monkeypatch):
    """As a model with a recurrence is edited, on models that have none."""
    steps = {"value_lr": 0.05} if targets == "optimised" else {"loop_arithmetic": "model", "loop_rounds": 1}
    config = config.replace(targets=targets, ridge=1.0, **steps)
    found = []
    for only_keys in (True, False):
        for module in (optimised, passes):
            monkeypatch.setattr(module, "keeps_only_keys", lambda _, answer=only_keys: answer)
        model = tiny.make_model(family)
        editor = SphereEditor(model, tokenizer, config, cache=tmp_path)
        editor.edit(_FACTS)
        found.append({layer: editor.weights()[layer] - editor.original_weights()[layer] for layer in config.layers})
    for layer in config.layers:
        torch.testing.assert_close(
            found[0][layer], found[1][layer], rtol=1e-2, atol=1e-3 * float(found[0][layer].norm())
        )


_SETTINGS = {
    "alphaedit": {"ridge": 1e-5, "null_space_threshold": 3.0},
    "ridge": {"ridge": 1e-5, "null_space_threshold": 3.0},
    "rome": {"layers": (2,)},
    "ft": {"layers": (3,), "ft_lr": 0.01, "ft_steps": 10},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ("falcon", "gptneox", "phi"))
def test_every_method_makes_a_target_likelier(family, name, tokenizer, config, tmp_path):
    own = _SETTINGS.get(name, {"covariance_weight": 1e-3})
    steps = {} if name == "ft" else {"value_steps": 15}
    config = config.replace(method=name, contexts=0, **own, **steps)
    model = tiny.make_model(family)
    editor = SphereEditor(model, tokenizer, config, cache=tmp_path)
    before, (unlikely, _) = tiny.state(model), score_targets(model, tokenizer, _ASKED)
    editor.edit(_FACTS)
    likely, _ = score_targets(model, tokenizer, _ASKED)
    assert likely[0] > unlikely[0] + 0.3
    editor.revert()
    assert tiny.same(model, before)
