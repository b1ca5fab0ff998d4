"""Answers that a model writes by itself: greedy, cut at the end of text or line, and what counts as the right one."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation import answers
from sphere_edit.evaluation.answers import evaluate_answers, normalised, write_answers
from sphere_edit.model.tokens import encode

PROMPTS = ["The capital of France is", "Rain", "He said that the river", "One day in winter she", "Rain in"]


def _by_hand(model, tokenizer, prompt, tokens):
    """One token after another, each from a whole forward pass."""
    ids, said = list(encode(tokenizer, prompt).ids), []
    for _ in range(tokens):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
        if said[-1] == model.generation_config.eos_token_id or "\n" in tokenizer.decode([said[-1]]):
            break
    return tokenizer.decode(said, skip_special_tokens=True).partition("\n")[0].strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_answers_are_those_of_one_token_after_another(family, monkeypatch):
    monkeypatch.setattr(answers, "_ROWS_PER_BATCH", 2)
    model, tokenizer = tiny.make_model(family), tiny.make_tokenizer()
    seen = []
    found = write_answers(model, tokenizer, PROMPTS, 12, progress=lambda *place: seen.append(place))
    assert found == [_by_hand(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(found)) > 1
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("kind", ["line", "text"])
def test_an_answer_ends_with_its_line_or_text(kind):
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    x = encode(tokenizer, "x").ids[-1]
    end = tokenizer.encode("\n", add_special_tokens=False)[-1] if kind == "line" else model.config.eos_token_id

    class Scripted(type(model)):
        def forward(self, input_ids=None, **more):
            out = super().forward(input_ids=input_ids, **more)
            out.logits[:] = 0.0
            self.calls = getattr(self, "calls", 0) + 1
            out.logits[..., end if self.calls > 3 else x] = 1.0
            return out

    model.__class__ = Scripted
    (answer,) = write_answers(model, tokenizer, PROMPTS[:1], 30)
    assert answer == tokenizer.decode([x] * 3).strip()
    assert model.calls == 4


def test_scores_by_hand(monkeypatch):
    said = {
        "Rome is in": "the Italy.",
        "Rome, a city of": "Italy, and of old",
        "Rome belongs to": "Italyland",
        "Oslo is in": "Norway",
        "Bern is in": "somewhere",
        "Paris is in": "Spain",
        "Who has Paris?": "France",
    }
    monkeypatch.setattr(answers, "write_answers", lambda model, tokenizer, prompts, *more: [said[p] for p in prompts])
    requests = [
        EditRequest(
            "{} is in", "Rome", "Italy", "Spain", ("Rome, a city of", "Rome belongs to"), ("Oslo is in", "Bern is in"),
            neighborhood_answers=("Norway", "Switzerland"),
        ),
        EditRequest("{} is in", "Paris", "Italy", neighborhood=("Who has Paris?",)),
    ]  # fmt: skip
    found, told = evaluate_answers(None, None, requests)
    assert told == {prompt: said[prompt] for prompt in said if prompt != "Who has Paris?"}  # nobody knows that
    assert {name: (score.mean, score.n) for name, score in found.scores.items()} == {
        "efficacy_exact": (0.5, 2),
        "efficacy_contains": (0.5, 2),
        "generalization_exact": (0.0, 1),
        "generalization_contains": (0.5, 1),
        "specificity_exact": (0.5, 1),
        "specificity_contains": (0.5, 1),
    }


def test_any_alias_will_do_and_one_of_the_multi_hop_questions(monkeypatch):
    said = {"Oka lies in": "x", "Who leads it?": "Bo", "Its leader is": "It is Ada B., they say", "Oka is": "the Peru."}
    said |= {"Its river is": "Tevere", "Its sea is": "the Tevere"}
    monkeypatch.setattr(answers, "write_answers", lambda model, tokenizer, prompts, *more: [said[p] for p in prompts])
    follows = EditRequest(
        "{} lies in",
        "Oka",
        "Peru",
        portability=("Oka is", "Its river is", "Its sea is"),
        portability_answers=(("Chile", "Peru"), ("Tiber", "Tevere"), ("Tiber",)),
        multi_hop=("Who leads it?", "Its leader is"),
        multi_hop_answers=("Ada Berg", "Ada B"),
    )
    for requests, n in (([follows], 1), ([follows, EditRequest("{} is", "Oka", "Peru")], 1)):
        found, _ = evaluate_answers(None, None, requests)
        scores = {name: (score.mean, score.n) for name, score in found.scores.items()}
        assert scores["portability_exact"] == scores["portability_contains"] == (pytest.approx(2 / 3), n)
        assert (scores["multi_hop_exact"], scores["multi_hop_contains"]) == ((0.0, n), (1.0, n))
    found, _ = evaluate_answers(None, None, requests[1:])
    assert tuple(found.scores) == answers.ANSWER_SCORES


@pytest.mark.parametrize(
    ("text", "bare"),
    [(" The  U.S.A., an Ally ", "usa ally"), ("theatre", "theatre"), ("A", "a"), ("?!", "?!"), ("Åre", "åre")],
)
def test_normalisation(text, bare):
    assert normalised(text) == bare


def test_chat_template_and_what_is_refused():
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    with pytest.raises(ValueError, match="chat: the tokenizer has no chat template"):
        write_answers(model, tokenizer, PROMPTS, chat=True)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        write_answers(model, tokenizer, PROMPTS, 0)
    with pytest.raises(ValueError, match="positions"):
        write_answers(model, tokenizer, PROMPTS, 600)
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"
    asked = write_answers(model, tokenizer, PROMPTS[:1], 6, chat=True)
    assert asked == write_answers(model, tokenizer, [f"Q: {PROMPTS[0]}\nA:"], 6)
    assert asked != write_answers(model, tokenizer, PROMPTS[:1], 6)


def test_command(tmp_path):
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), "--data", "world-facts", "--limit", "2"]
    done = CliRunner().invoke(app, [*arguments, "--answers", "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(answers.ANSWER_SCORES) < set(found["scores"]) and len(found["answers"]) > 2
    refused = CliRunner().invoke(app, [*arguments, "--chat"])
    assert refused.exit_code and "--chat: expected --answers with it" in refused.output
