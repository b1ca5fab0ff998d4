"""The optimised values against a plain implementation: one fact at a time, the whole model, one row at a time."""

from __future__ import annotations

from contextlib import contextmanager

import plain
import pytest
import tiny
import torch

from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest
from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import find_structure
from sphere_edit.targets import optimised
from sphere_edit.targets.optimised import optimise_values

_LAYER = 2
_CONTEXTS = ["{}", "The cat sat. {}", "Therefore, one says. {}"]
_CONFIG = EditConfig(
    targets="optimised", value_steps=6, value_lr=0.1, value_weight_decay=0.5, value_clamp=2.0, value_stop=0.0
)
# Of the six facts some start below this threshold, some reach it at different steps, one never does.
_STOPPING = EditConfig(
    targets="optimised",
    value_steps=10,
    value_lr=0.5,
    value_weight_decay=0.1,
    value_kl=0.1,
    value_clamp=6.0,
    value_stop=13.3,
)


@contextmanager
def _shifted(block, at: int, shift: torch.Tensor):
    """The block's output with ``shift`` added at token ``at``."""

    def hook(_, __, out):
        first = (out[0] if isinstance(out, tuple) else out).clone()
        first[:, at] = first[:, at] + shift
        return (first, *out[1:]) if isinstance(out, tuple) else first

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _plain(model, tokenizer, structure, request: EditRequest, contexts, config: EditConfig, layer: int):
    """(value, loss, nll, steps) of one fact."""
    block = structure.blocks[layer]
    seen: list[torch.Tensor] = []
    ids, at = plain.subject_last(tokenizer, request.prompt, request.subject)
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    start = seen[0][0, at]
    essence, essence_at = plain.subject_last(tokenizer, "{} is a", request.subject)

    def about(shift):
        with _shifted(block, essence_at, shift):
            return model(torch.tensor([essence])).logits[0, essence_at].log_softmax(-1)

    delta = torch.zeros_like(start, requires_grad=True)
    reference = about(torch.zeros_like(start)).detach()
    adam = torch.optim.Adam([delta], lr=config.value_lr, betas=(config.value_beta1, config.value_beta2))
    likeliest = 0
    for step in range(1, config.value_steps + 1):
        adam.zero_grad()
        nll, first = torch.zeros(()), True
        for context in contexts:
            template = context.replace("{}", request.prompt)
            prompt, at = plain.subject_last(tokenizer, template, request.subject)
            whole = tokenizer(template.replace("{}", request.subject) + " " + request.target_new)["input_ids"]
            with _shifted(block, at, delta):
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            nll = nll - sum(log_probs[i - 1, whole[i]] for i in places) / len(places) / len(contexts)
            first = first and all(int(log_probs[i - 1].argmax()) == whole[i] for i in places)
        now = about(delta)
        kl = (now.exp() * (now - reference)).sum()
        decay = config.value_weight_decay * (delta.norm() / start.norm() ** 2 if step > 1 else 0.0 * delta.sum())
        loss = nll + config.value_kl * kl + decay
        likeliest += first
        stops = {"loss": loss.item() < config.value_stop, "nll": nll.item() < config.value_stop}
        stops["argmax"] = first and likeliest == 3
        if stops[config.value_stop_on] or step == config.value_steps:
            return (start + delta).detach(), loss.item(), nll.item(), step
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = config.value_clamp * start.norm()
            if delta.norm() > limit:
                delta *= limit / delta.norm()
    raise AssertionError


def _run(family, tokenizer, requests, contexts=_CONTEXTS, config=_CONFIG, dtype=torch.float32, check=True, **kwargs):
    model = tiny.make_model(family, dtype=dtype)
    structure = find_structure(model)
    if family == "llama":
        structure.head.weight.data *= 4  # a head as sharp as a trained one, so that a few steps bring the loss down
    with frozen(model):
        got = optimise_values(model, tokenizer, structure, requests, contexts, config, _LAYER, **kwargs)
        want = [_plain(model, tokenizer, structure, r, contexts, config, _LAYER) for r in requests] if check else []
    return got, want


def _start(family, tokenizer, requests):
    """Each fact's z₀, from a run whose only evaluation is at δ = 0."""
    return _run(family, tokenizer, requests, config=_CONFIG.replace(value_steps=1), check=False)[0].target


def _assert_close(got, want, tolerance=2e-3):
    torch.testing.assert_close(got.target, torch.stack([w[0] for w in want]), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.loss, torch.tensor([w[1] for w in want]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(got.nll, torch.tensor([w[2] for w in want]), atol=1e-3, rtol=1e-3)
    assert got.steps.tolist() == [w[3] for w in want]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt"])
def test_equals_the_plain_implementation(family, tokenizer):
    got, want = _run(family, tokenizer, tiny.facts(4))
    _assert_close(got, want)
    moved = (got.target - _start(family, tokenizer, tiny.facts(4))).norm(dim=1)
    assert (moved > 0.2).all()
    assert torch.isfinite(got.loss).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"value_kl": 2.0},
        {"value_weight_decay": 50.0},
        {"value_clamp": 0.05, "value_lr": 0.5},
        {"value_steps": 1},
        {"value_steps": 2},
        {"value_kl": 0.0, "value_weight_decay": 0.0},
        {"value_beta1": 0.5, "value_beta2": 0.9, "value_lr": 0.3},
        {"value_beta1": 0.0, "value_beta2": 0.0},
    ],
    ids=str,
)
def test_every_term_counts(changes, tokenizer):
    got, want = _run("llama", tokenizer, tiny.facts(3), _CONTEXTS[:2], _CONFIG.replace(**changes))
    _assert_close(got, want)


def test_tokenizer_with_bos(bos_tokenizer):
    _assert_close(*_run("llama", bos_tokenizer, tiny.facts(4), _CONTEXTS[:2]))


def test_clamp_holds(tokenizer):
    requests = tiny.facts(4)
    start = _start("llama", tokenizer, requests)
    config = _CONFIG.replace(value_clamp=0.3, value_lr=0.5)
    got, _ = _run("llama", tokenizer, requests, config=config, check=False)
    share = (got.target - start).norm(dim=1) / start.norm(dim=1)
    assert (share <= 0.3 * (1 + 1e-4)).all() and (share > 0.29).all()


@pytest.mark.parametrize("on", ["loss", "nll"])
def test_facts_stop_one_by_one(on, tokenizer):
    """A threshold that facts reach at different steps; those that stopped keep the value they stopped with."""
    config = _STOPPING.replace(value_stop_on=on)
    got, want = _run("llama", tokenizer, tiny.facts(6), _CONTEXTS[:2], config)
    _assert_close(got, want)
    assert len(set(got.steps.tolist())) > 2
    stopped = got.steps < 10
    assert stopped.sum() in (4, 5) and ((got.loss if on == "loss" else got.nll)[stopped] < 13.3).all()


def test_stopping_on_nll_is_earlier(tokenizer):
    config, requests = _STOPPING.replace(value_weight_decay=10.0), tiny.facts(6)
    on_loss, _ = _run("llama", tokenizer, requests, _CONTEXTS[:2], config, check=False)
    on_nll, _ = _run("llama", tokenizer, requests, _CONTEXTS[:2], config.replace(value_stop_on="nll"), check=False)
    assert (on_nll.steps <= on_loss.steps).all() and (on_nll.steps < on_loss.steps).any()


def test_stopping_two_steps_after_the_target_is_the_likeliest(tokenizer):
    """Facts get there at different steps, in every context; a loss below every threshold does not stop them before."""
    tongue, words = tiny.facts(4)[3], ("the", "of", "a", "in", "to")
    requests = [EditRequest(tongue.prompt, tongue.subject, word, None, id=word) for word in words] + tiny.facts(1)
    config = _STOPPING.replace(value_steps=30, value_lr=0.8, value_stop=1e9, value_stop_on="argmax")
    got, want = _run("llama", tokenizer, requests, _CONTEXTS[:2], config)
    _assert_close(got, want)
    stopped = got.steps < 30
    assert stopped.sum() >= 3 and len(set(got.steps[stopped].tolist())) >= 3 and not stopped[-1]


def test_other_facts_in_the_batch_do_not_matter(tokenizer):
    requests = tiny.facts(6)
    config = _STOPPING
    together, _ = _run("llama", tokenizer, requests, config=config, check=False)
    backwards, _ = _run("llama", tokenizer, requests[::-1], config=config, check=False)
    torch.testing.assert_close(backwards.target.flip(0), together.target, atol=2e-3, rtol=2e-3)
    for i in (0, 3, 5):
        alone, _ = _run("llama", tokenizer, requests[i : i + 1], config=config, check=False)
        torch.testing.assert_close(alone.target[0], together.target[i], atol=2e-3, rtol=2e-3)
        assert alone.steps[0] == together.steps[i]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_groups_may_be_cut_anywhere(rows, tokenizer, monkeypatch):
    requests, config = tiny.facts(6), _STOPPING
    want, _ = _run("llama", tokenizer, requests, config=config, check=False)
    monkeypatch.setattr(optimised, "_ROWS_PER_GROUP", rows)
    got, _ = _run("llama", tokenizer, requests, config=config, check=False)
    torch.testing.assert_close(got.target, want.target, atol=2e-3, rtol=2e-3)
    assert torch.equal(got.steps, want.steps)


def test_progress_counts_steps(tokenizer):
    calls = []
    _run("llama", tokenizer, tiny.facts(3), check=False, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tokenizer):
    want, _ = _run("llama", tokenizer, tiny.facts(3), check=False)
    got, _ = _run("llama", tokenizer, tiny.facts(3), dtype=dtype, check=False)
    assert got.target.dtype == got.loss.dtype == torch.float32
    tolerance = 2e-3 if dtype == torch.float64 else 0.3
    torch.testing.assert_close(got.nll, want.nll, atol=tolerance, rtol=tolerance / 10)
    if dtype == torch.float64:
        torch.testing.assert_close(got.target, want.target, atol=2e-3, rtol=2e-3)
