"""NAS: values of the length that values have in the unedited model, against the formula written out in fp64."""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.editing import batch as module
from sphere_edit.model.inference import frozen
from sphere_edit.targets.anchor import anchored, mean_length, solved_outputs
from sphere_edit.targets.optimised import Values, optimise_values

_OWN = {name: {"covariance_weight": 10.0} for name in ("memit", "rect", "prune")}


@pytest.fixture
def others(monkeypatch):
    """What stands in for the world-facts of another seed."""
    facts = tiny.places(7)
    monkeypatch.setattr("sphere_edit.targets.others.world_facts", lambda seed: facts if seed == 1 else [])
    return facts


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(start, target, outputs=()):
    zero = torch.zeros(len(start))
    return Values(target, zero, zero, zero.long(), start, dict(outputs))


def by_hand(said, own, anchor):
    rows = [v * anchor / v.norm() if v.norm() <= 2 * anchor else o for v, o in zip(said, own, strict=True)]
    return torch.stack(rows), torch.tensor([bool(v.norm() > 2 * anchor) for v in said])


def test_the_values_of_a_block():
    """The rest of the block's output stays, what the last map says is scaled; short values become longer."""
    start, own = randn(5, 8), {1: 9 * randn(5, 8, seed=1), 3: randn(5, 8, seed=2)}
    said = randn(5, 8, seed=3) * torch.tensor([0.1, 1.0, 1.9, 2.1, 5.0])[:, None]
    said = said / said.norm(dim=1, keepdim=True) * torch.tensor([0.3, 3.0, 5.7, 6.3, 15.0])[:, None]
    values = made(start, start + said - own[3])
    torch.testing.assert_close(solved_outputs(values, own)[3], said)
    found, given_up = anchored(values, own, {3: 3.0})
    want, beyond = by_hand(said.double(), own[3].double(), 3.0)
    torch.testing.assert_close(found.target.double(), start.double() - own[3] + want, atol=1e-5, rtol=1e-5)
    assert given_up.tolist() == beyond.tolist() == [False, False, False, True, True]
    assert found.outputs == {} and torch.equal(found.start, start)


def test_the_values_of_maps():
    own = {layer: randn(4, 6, seed=layer) for layer in (1, 2)}
    said = {layer: 2 * randn(4, 6, seed=10 + layer) for layer in (1, 2)}
    anchors = {1: float(said[1].norm(dim=1).mean()), 2: float(said[2][0].norm() / 2.5)}
    found, given_up = anchored(made(own[2], said[2], said), own, anchors)
    beyond = torch.zeros(4, dtype=torch.bool)
    for layer, anchor in anchors.items():
        want, out = by_hand(said[layer].double(), own[layer].double(), anchor)
        torch.testing.assert_close(found.outputs[layer].double(), want, atol=1e-5, rtol=1e-5)
        beyond |= out
    assert torch.equal(found.target, found.outputs[2]) and torch.equal(given_up, beyond) and given_up[0]


def test_the_anchor_leaves_the_longest_twentieth_out():
    lengths = torch.arange(1.0, 41.0)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    directions = torch.nn.functional.normalize(randn(40, 5), dim=1)
    assert mean_length(directions * lengths[:, None]) == pytest.approx(sum(range(1, 39)) / 38, rel=1e-6)
    assert mean_length(directions[:19] * 3) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("family", ("llama", "gpt2", "olmo2"))
def test_the_anchor_is_that_of_other_facts_in_the_model_before_all_edits(family, others, make, tokenizer):
    """One pass a fact: what the last map says with what its value adds; where a norm follows, of every map."""
    editor = make(family, value_anchor=5, batch_size=3, null_space_threshold=1.0)
    editor.prepare()
    facts = [others[i * 7 // 5] for i in range(5)]
    maps = [editor.structure.edited[layer] for layer in (1, 2, 3)] if family == "olmo2" else []
    config, structure = editor.config, editor.structure
    lengths = {layer: [] for layer in ((1, 2, 3) if maps else (3,))}
    with frozen(editor.model), torch.no_grad():
        for fact in facts:
            values = optimise_values(editor.model, tokenizer, structure, [fact], ["{}"], config, 3, None, maps)
            if maps:
                for layer in lengths:
                    lengths[layer].append(values.outputs[layer].norm())
                continue
            said = []
            hook = structure.down[3].module.register_forward_hook(lambda _, __, out, said=said: said.append(out))
            text = fact.text[: fact.text.index(fact.subject) + len(fact.subject)]
            editor.model(torch.tensor([tokenizer(text)["input_ids"]]))
            hook.remove()
            lengths[3].append((said[0].reshape(-1, tiny.HIDDEN)[-1] + values.target[0] - values.start[0]).norm())
    want = {layer: float(torch.stack(found).mean()) for layer, found in lengths.items()}
    assert editor._writer.anchors == pytest.approx(want, rel=2e-2)


@pytest.mark.parametrize("sphere", (True, False), ids=("sphere", "alone"))
@pytest.mark.parametrize("name", ("alphaedit", "memit", "rect", "prune", "rome", "ridge"))
def test_every_solving_method_solves_for_anchored_values(name, sphere, others, make, monkeypatch):
    """All are scaled to the anchor, or given up far beyond it."""
    seen, original = [], module.anchored
    monkeypatch.setattr(module, "anchored", lambda *args: seen.append((args, original(*args))) or seen[-1][1])
    settings = {"method": name, "sphere": sphere, "layers": (2,) if name == "rome" else (1, 2, 3), **_OWN.get(name, {})}
    editor, free = make(value_anchor=5, **settings), make(**settings)
    events = editor.edit(tiny.facts(4)).events
    free.edit(tiny.facts(4))
    (prepared,) = [event for event in events if event["event"] == "prepared"]
    (anchor,) = prepared["anchors"].values()
    last = settings["layers"][-1]
    for (values, own, anchors), (found, given_up) in seen:
        assert anchors == {last: anchor}
        lengths = (own[last] + found.target - found.start).norm(dim=1)
        torch.testing.assert_close(lengths[~given_up], torch.full_like(lengths[~given_up], anchor), rtol=1e-4, atol=0)
        assert torch.equal(found.target[given_up], found.start[given_up])
        assert not torch.equal(values.target, found.target)
    told = [event["beyond_anchor"] for event in events if event["event"] == "batch"]
    assert told == [int(given_up.sum()) for _, (_, given_up) in seen] and len(told) == 2
    assert not any(torch.equal(free.weights()[layer], weight) for layer, weight in editor.weights().items())


def test_a_value_far_beyond_is_given_up_and_the_fact_held(others, make):
    editor = make(value_anchor=5, value_clamp=400.0, value_lr=50.0, layers=(2,), batch_size=4)
    editor.prepare()
    editor._writer.anchors = {2: editor._writer.anchors[2] / 100}
    before = tiny.state(editor.model)
    (batch,) = [event for event in editor.edit(tiny.facts(4)).events if event["event"] == "batch"]
    assert batch["beyond_anchor"] == 4 and batch["reached"] is None
    change = max(float((value - before[name]).abs().max()) for name, value in editor.model.state_dict().items())
    assert change < 1e-5


def test_fingerprints_and_replay(others, make):
    editor, twin, other = make(value_anchor=5), make(value_anchor=5), make(value_anchor=6)
    records = editor.edit(tiny.facts(4)).records
    for record in records:
        twin.replay(record)
    assert tiny.same(twin.model, tiny.state(editor.model))
    assert editor.fingerprints() == twin.fingerprints()
    assert editor.fingerprints()["anchors"] != other.fingerprints()["anchors"]
    assert "anchors" not in make().fingerprints()


def test_more_facts_than_there_are(others, make):
    editor = make(value_anchor=8)
    before = tiny.state(editor.model)
    with pytest.raises(ValueError, match="value_anchor: expected at most 7, .*, got 8"):
        editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)
