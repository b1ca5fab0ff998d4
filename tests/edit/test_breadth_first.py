"""Breadth-first fine-tuning (LocFT-BF) against the same steps on the model's own parameters, fact by fact."""

from __future__ import annotations

import pytest
import tiny
import torch

from sphere_edit.methods.fine_tuning import tune
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import find_structure
from sphere_edit.model.tokens import encode
from sphere_edit.targets.presets import PRESETS, auto_layers, preset


def ended_nll(model, tokenizer, fact):
    """Mean NLL of the target's tokens and EOS, from one row."""
    prompt = tokenizer(fact.text)["input_ids"]
    whole = tokenizer(f"{fact.text} {fact.target_new}")["input_ids"] + [tokenizer.eos_token_id]
    log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return -torch.stack([log_probs[i - 1, whole[i]] for i in range(len(prompt), len(whole))]).mean()


def by_hand(twin, tokenizer, facts, layers, epochs, size, stop, lr, seed=0):
    """(changes by layer, steps, last NLL of each fact); the order is torch's permutation of the seed."""
    weights = {layer: find_structure(twin).down[layer].module.weight for layer in layers}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    adam, drawn, steps = torch.optim.Adam(weights.values(), lr=lr), torch.Generator().manual_seed(seed), 0
    last = torch.zeros(len(facts))
    for _ in range(epochs):
        order = torch.randperm(len(facts), generator=drawn).tolist()
        for at in range(0, len(facts), size):
            adam.zero_grad()
            nll = torch.stack([ended_nll(twin, tokenizer, facts[i]) for i in order[at : at + size]])
            last[order[at : at + size]] = nll.detach()
            if nll.mean() >= stop:
                nll.mean().backward()
                adam.step()
                steps += 1
        if last.mean() < stop:
            break
    return {layer: weight.detach() - before[layer] for layer, weight in weights.items()}, steps, last


# So small a model cannot be surer than about 0.8 nats; at 2 some steps are left out, and it ends early.
@pytest.mark.parametrize(("epochs", "stop"), [(3, 0.0), (60, 2.0)])
def test_epochs_of_minibatches(epochs, stop, make, tokenizer):
    facts, layers, lr = tiny.facts(6)[:5], (2, 4), 1e-2
    settings = {"ft_steps": epochs, "ft_lr": lr, "ft_stop": stop, "ft_minibatch": 2, "ft_eos": True}
    editor = make(method="ft", layers=layers, **settings)
    want, steps, last = by_hand(tiny.make_model("llama"), tokenizer, facts, layers, epochs, 2, stop, lr)
    with frozen(editor.model):
        found = tune(editor.model, tokenizer, editor.structure, facts, editor.config, layers)
    assert found.steps == steps and (steps == 3 * epochs if stop == 0 else steps < 3 * epochs and steps % 3)
    torch.testing.assert_close(found.nll, last, atol=2e-2, rtol=1e-2)
    for layer in layers:
        assert want[layer].abs().max() > 0.5 * lr
        assert (found.updates[layer] - want[layer]).norm() < 0.05 * want[layer].norm()


def test_without_the_end_or_in_another_order_it_is_something_else(make, tokenizer):
    facts, layers = tiny.facts(5), (2,)
    settings = {"method": "ft", "layers": layers, "ft_steps": 3, "ft_lr": 1e-2, "ft_stop": 0.0, "sphere": False}
    editor = make(ft_minibatch=2, ft_eos=True, **settings)
    other = [{}, {"ft_eos": False}, {"seed": 1}, {"ft_minibatch": 3}, {"ft_minibatch": 0}]
    found = []
    with frozen(editor.model):
        for changes in other:
            config = editor.config.replace(**changes)
            found.append(tune(editor.model, tokenizer, editor.structure, facts, config, layers).updates[2])
    assert all((update - found[0]).norm() > 0.1 * found[0].norm() for update in found[1:])


def test_a_batch_of_all_facts_is_written_at_once_and_undone(make):
    settings = {"ft_steps": 8, "ft_lr": 1e-2, "ft_minibatch": 2, "ft_eos": True, "batch_size": 100_000}
    editor = make(method="ft", layers=(3,), **settings)
    before = tiny.state(editor.model)
    result = editor.edit(tiny.facts(5))
    (batch,) = [event for event in result.events if event["event"] == "batch"]
    assert batch["size"] == 5 and batch["steps"] == 24 and not tiny.same(editor.model, before)
    editor.revert()
    assert tiny.same(editor.model, before)


def test_the_end_belongs_to_the_target(tokenizer, bos_tokenizer):
    for one in (tokenizer, bos_tokenizer, tiny.make_tokenizer(eos=True)):
        plain, ended = (encode(one, "The capital of {} is", "Vanuatu", "Rome", ended=yes) for yes in (False, True))
        assert ended.target == (*plain.target, one.eos_token_id) and ended.ids == (*plain.ids, plain.target[-1])
        assert ended.subject_last == plain.subject_last


def test_a_tokenizer_without_an_end_is_refused_before_anything_is_changed(make):
    editor = make(method="ft", layers=(3,), ft_eos=True)
    editor.tokenizer = tiny.make_tokenizer()
    editor.tokenizer.eos_token = None
    before = tiny.state(editor.model)
    with pytest.raises(ValueError, match="ft_eos: the tokenizer has no end-of-text token; expected ft_eos: false"):
        editor.edit(tiny.facts(2))
    assert tiny.same(editor.model, before)


def test_the_preset():
    found = preset("locft-bf")
    assert found == PRESETS["locft-bf"] == preset("locft-bf", "ft")
    assert (found.method, found.sphere, found.batch_size, found.ft_minibatch) == ("ft", False, 100_000, 100)
    assert (found.ft_steps, found.ft_lr, found.ft_stop, found.ft_eos) == (25, 5e-4, 1e-2, True)
    assert found.layers == () and auto_layers(32, "ft") == (21,)
