"""General ability by lm-evaluation-harness: against one forward pass, and of a model taught what to say; offline."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import random
import re
import socket
import statistics

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.config import ConfigError
from sphere_edit.data.reading import DataError
from sphere_edit.evaluation.harness import TASKS, general_ability, read_tasks
from sphere_edit.experiments import run as experiment
from sphere_edit.model.structure import StructureError
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import RunError
from sphere_edit.runs.spec import RunOptions

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (the extra harness)", allow_module_level=True)

_WORDS = ("the river", "a mill", "Anna", "the night", "home", "rain for days", "an old town", "nobody")
# An odd number of each, so that turned labels turn the accuracy.
_BOOLQ = [
    {
        "title": _WORDS[i % 8].title(),
        "passage": f"{_WORDS[i % 8]} and {_WORDS[(3 * i + 1) % 8]}, it is said.",
        "question": f"is {_WORDS[i % 8]} near {_WORDS[(i * i) % 8]}",
        "answer": i % 3 == 0,
    }
    for i in range(13)
]
_RTE = [(f'"{_WORDS[i % 8]}" saw {_WORDS[(i + 2) % 8]}.', f"{_WORDS[(5 * i) % 8]} was seen.", i % 2) for i in range(13)]
# Question, known answers, and what the model is taught to say to it.
_NQ = [
    ("where is the mill?", ["Rome!"], " Rome\nQ: and the river?"),
    ("what did anna see?", ["red door"], " The Red Door. It was"),
    ("who was home?", ["Bo", "ANN LEE"], " Ann Lee"),
    ("where did it rain?", ["Japan"], " Peru, not Japan"),
]
_GSM8K = [
    ("Anna has 3 and 4.", "1234", " 3 + 4\n#### 1,234 of 9"),
    ("Bo has 2 and 3.", "5", " It is 5."),
    ("The mill has 8.", "8", " #### 8 Question: 9"),
    ("A town of 12.", "12", " about $12"),
]
_NQ_PROMPT = "Answer these questions:\n\nQ: {}\nA:"
_GSM8K_PROMPT = "Question: {}\nAnswer:"


def _write(folder):
    lines = {
        "sphere_test-ClosedDomainQA.jsonl.gz": map(json.dumps, _BOOLQ),
        "sphere_test-NLI.tsv.gz": [
            "index\tsentence1\tsentence2\tlabel",
            *(f"{i}\t{a}\t{b}\t{'not_' * c}entailment" for i, (a, b, c) in enumerate(_RTE)),
        ],
        "sphere_test-OpenDomainQA.jsonl.gz": (
            json.dumps({"question": q, "answer": a, "output": []}) for q, a, _ in _NQ
        ),
        "sphere_test-reasoning.jsonl.gz": (
            json.dumps({"question": q, "answer": f"It is so.\n#### {a}"}) for q, a, _ in _GSM8K
        ),
    }
    for name, texts in lines.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("general")
    _write(made)
    return made


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail(f"the network was asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "max_gen_toks", 24)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def tok(request, tokenizer, bos_tokenizer):
    return bos_tokenizer if request.param else tokenizer


def _log_likelihood(model, tok, prompt: str, answer: str) -> float:
    ids, first = tok(prompt + answer)["input_ids"], len(tok(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids)))


def _check(score, right: list[bool]) -> None:
    assert score["n"] == len(right)
    assert score["mean"] == pytest.approx(statistics.mean(right))
    assert score["stderr"] == pytest.approx(statistics.stdev(map(float, right)) / math.sqrt(len(right)))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_choices_are_made_by_log_likelihood(batch_size, tok, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    computed, original = {}, HFLM.loglikelihood

    def spy(self, requests, **kwargs):
        answers = original(self, requests, **kwargs)
        computed.update({r.args: value for r, (value, _) in zip(requests, answers, strict=True)})
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", spy)
    model = tiny.make_model("llama", seed=3)
    found = general_ability(model, tok, ("rte", "boolq"), folder, batch_size=batch_size)
    wanted = {}

    def chosen(prompt, answers):
        values = [_log_likelihood(model, tok, prompt, answer) for answer in answers]
        wanted.update({(prompt, answer): value for answer, value in zip(answers, values, strict=True)})
        return values.index(max(values))

    boolq, rte = [], []
    for r in _BOOLQ:
        prompt = f"{r['title']} -- {r['passage']}\nQuestion: {r['question']}?\nAnswer:"
        boolq.append(chosen(prompt, (" no", " yes")) == r["answer"])
    for first, second, label in _RTE:
        rte.append(chosen(f"{first}\nQuestion: {second} True or False?\nAnswer:", (" True", " False")) == label)
    assert computed == pytest.approx(wanted, abs=2e-4)
    assert list(found) == ["rte", "boolq"] and list(found["rte"]) == list(found["boolq"]) == ["acc"]
    _check(found["boolq"]["acc"], boolq)
    _check(found["rte"]["acc"], rte)
    assert 0 < found["boolq"]["acc"]["mean"] < 1 and 0 < found["rte"]["acc"]["mean"] < 1


@pytest.fixture(scope="module")
def taught(tok):
    """A model that says what the lessons say, and then EOS."""
    model = tiny.make_model("llama")
    lessons = [(_NQ_PROMPT.format(q), said) for q, _, said in _NQ]
    lessons += [(_GSM8K_PROMPT.format(q), said) for q, _, said in _GSM8K]
    rows = [[*tok(prompt + said)["input_ids"], tok.eos_token_id] for prompt, said in lessons]
    ids, labels = torch.ones(2, len(rows), max(map(len, rows)), dtype=torch.long)
    labels.fill_(-100)
    for i, (row, (prompt, _)) in enumerate(zip(rows, lessons, strict=True)):
        first = len(tok(prompt)["input_ids"])
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, first : len(row)] = ids[i, first : len(row)]
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        adam.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        adam.step()
        if loss < 0.05:
            return model
    raise AssertionError(f"the lessons were not learnt: {loss}")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_generated_and_compared(batch_size, tok, taught, folder):
    found = general_ability(taught, tok, ("nq", "gsm8k"), folder, shots=0, batch_size=batch_size)
    assert list(found["nq"]) == ["exact_match"]
    assert list(found["gsm8k"]) == ["exact_match_strict", "exact_match_flexible"]
    _check(found["nq"]["exact_match"], [True, True, True, False])
    _check(found["gsm8k"]["exact_match_strict"], [True, False, True, False])
    _check(found["gsm8k"]["exact_match_flexible"], [False, True, True, True])


def test_limit_takes_the_first_records(taught, tok, folder):
    found = general_ability(taught, tok, ("nq", "gsm8k"), folder, limit=1, shots=0)
    assert found["nq"] == {"exact_match": {"mean": 1.0, "stderr": None, "n": 1}}
    assert found["gsm8k"]["exact_match_flexible"] == {"mean": 0.0, "stderr": None, "n": 1}


@pytest.fixture
def asked(monkeypatch):
    """The prompts that answers are generated for; none is."""
    from lm_eval.models.huggingface import HFLM

    prompts = []

    def generate_until(self, requests, **kwargs):
        prompts.extend(request.args[0] for request in requests)
        return ["" for _ in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return prompts


def test_worked_examples_are_other_records_of_the_file(asked, tokenizer, tmp_path):
    questions = [f"{name} has {i}." for i, name in enumerate(_WORDS)]
    with gzip.open(tmp_path / TASKS["gsm8k"].file, "wt") as file:
        file.writelines(json.dumps({"question": q, "answer": f"So.\n#### {i}"}) + "\n" for i, q in enumerate(questions))
    model = tiny.make_model("llama")
    for _ in range(2):
        general_ability(model, tokenizer, ("gsm8k",), tmp_path, limit=6)
    assert asked[:6] == asked[6:] and len(asked) == 12
    for i, prompt in enumerate(asked[:6]):
        parts = re.findall(r"Question: (.*?)\nAnswer:(?: So\.\n#### (\d))?", prompt)
        assert parts[-1] == (questions[i], "") and len({question for question, _ in parts}) == 6
        assert all(question == questions[int(answer)] for question, answer in parts[:-1])
    assert len(set(asked[:6])) == 6


def test_nothing_is_left_changed(folder):
    tok, model = tiny.make_tokenizer(), tiny.make_model("gpt2").train()
    tok.pad_token, tok.padding_side = None, "right"
    model.transformer.h[1].eval()
    model.transformer.h[2].mlp.c_fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    before, settings = tiny.state(model), model.generation_config.to_dict()

    def draws():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

    drawn = draws()
    general_ability(model, tok, data=folder, limit=2, shots=1)
    assert draws() == drawn
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert tiny.same(model, before) and model.generation_config.to_dict() == settings
    assert tok.pad_token is None and tok.padding_side == "right"


def _damage(name: str, text: str):
    def make(folder):
        (folder / TASKS[name].file).write_bytes(gzip.compress(text.encode()))

    return make


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (None, {"tasks": ("boolq", "mmlu")}, "task 'mmlu' is not known; expected some of boolq, rte, nq, gsm8k"),
        (None, {"tasks": ()}, "tasks: expected some of boolq"),
        (None, {"tasks": ("nq", "nq")}, "each once"),
        (None, {"limit": 0}, "limit: expected a whole number of at least 1, got 0"),
        (None, {"shots": -1}, "shots: expected a whole number of at least 0, got -1"),
        (None, {"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        (None, {"data": None}, "no data folder; name the one that has sphere_test-ClosedDomainQA"),
        (None, {}, r"sphere_test-reasoning.jsonl.gz: 4 records; expected at least 6, one asked and 5 shots"),
        (lambda folder: (folder / TASKS["rte"].file).unlink(), {}, "sphere_test-NLI.tsv.gz: no such file"),
        (lambda folder: (folder / TASKS["nq"].file).unlink(), {}, "sphere_test-OpenDomainQA.jsonl.gz: no such file"),
        (_damage("boolq", '{"title": "a", "passage": "b", "question": "c", "answer": 1}'), {}, "must be true or false"),
        (_damage("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe"), {}, "line 2: field 'label' must be one"),
        (_damage("rte", "index\tsentence1\n0\ta"), {}, "line 2: field 'label' is missing"),
        (_damage("rte", "index\tsentence1\tsentence2\tlabel\n0\ta"), {}, "must be text, got NoneType"),
        (_damage("rte", ""), {}, "sphere_test-NLI.tsv.gz: 0 records"),
        (lambda folder: (folder / TASKS["rte"].file).write_text("a\tb"), {}, "NLI.tsv.gz: cannot be read"),
        (_damage("nq", '{"question": "who?", "answer": []}'), {}, "'answer' is empty"),
        (_damage("gsm8k", '{"question": "how many?", "answer": "7"}'), {}, "must end in '#### ' and a number, got '7'"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(change, given, message, tmp_path, tokenizer, monkeypatch):
    monkeypatch.delenv("SPHERE_EDIT_DATA", raising=False)
    _write(tmp_path)
    if change is not None:
        change(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        general_ability(None, tokenizer, **{"data": tmp_path, **given})


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval is not installed; pip install 'sphere-kernels\[harness\]'"):
        read_tasks(("nq",), folder)


def test_tokenizers_that_cannot_be_asked(folder):
    with pytest.raises(ConfigError, match="ends every text with EOS"):
        general_ability(None, tiny.make_tokenizer(eos=True), ("nq",), folder)
    tok = tiny.make_tokenizer()
    tok.eos_token = None
    with pytest.raises(ConfigError, match="has no EOS token"):
        general_ability(None, tok, ("nq",), folder)


def test_a_model_that_is_not_in_memory(tokenizer, folder):
    model = tiny.make_model("llama").to("meta")
    with pytest.raises(StructureError, match="is on the meta device"):
        general_ability(model, tokenizer, ("nq",), folder)


def test_the_command(folder, tmp_path, tokenizer, monkeypatch):
    tiny.make_model("llama", seed=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("SPHERE_EDIT_DATA", str(folder))

    def call(*args):
        return CliRunner().invoke(app, ["harness", *map(str, args)])

    result = call(tmp_path / "model", "--tasks", "rte, boolq", "--limit", 5, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "general ability" in result.stdout and "rte" in result.stdout
    got = json.loads((tmp_path / "found.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert got["tasks"] == general_ability(model, tokenizer, ("rte", "boolq"), folder, limit=5)
    assert got["limit"] == 5 and got["model"] == str(tmp_path / "model")
    for args, message in (
        (("--tasks", "rte,mmlu"), "task 'mmlu' is not known"),
        (("--data", tmp_path), "sphere_test-ClosedDomainQA.jsonl.gz: no such file"),
        (("--shots", 4), "4 records; expected at least 5"),
    ):
        wrong = call(tmp_path / "nothing", *args)  # said before a model is looked for
        assert wrong.exit_code == 2 and message in " ".join(wrong.stderr.split())


def _run(folder, out, tokenizer, on_event=None, **options):
    settings = tiny.CONFIG.replace(targets="closed_loop", contexts=0, loop_arithmetic="model", loop_rounds=2)
    given = {"harness": ("rte", "boolq"), "harness_data": str(folder), "harness_limit": 7, "perplexity_tokens": 300}
    options = RunOptions("tiny", "facts", out, curve_every=1, **given | options)
    model = tiny.make_model("llama", seed=3)
    experiment.run(model, tokenizer, tiny.facts(4), settings, options, on_event)
    return model


def test_a_run_scores_the_edited_model_in_place(folder, tokenizer, tmp_path):
    edited = _run(folder, tmp_path / "run", tokenizer)
    events = run_folder.read_events(tmp_path / "run")
    before, after = (e["ability"] for e in events if e["event"] == "evaluation")
    on_the_way = [e["ability"] for e in events if e["event"] == "curve"]
    for found, model in ((before, tiny.make_model("llama", seed=3)), (after, edited)):
        own = general_ability(model, tokenizer, ("rte", "boolq"), folder, limit=7)
        assert found == {f"{task} {metric}": s for task, scores in own.items() for metric, s in scores.items()}
        assert found["rte acc"]["n"] == 7
    assert len(on_the_way) == 2 and on_the_way[-1] == after
    page = (tmp_path / "run" / run_folder.REPORT).read_text(encoding="utf-8")
    assert '<table id="ability">' in page and "General ability over edits" in page and "rte acc" in page

    def interrupt(event):
        if event["event"] == "batch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(folder, tmp_path / "cut", tokenizer, interrupt)
    experiment.resume(tiny.make_model("llama", seed=3), tokenizer, tmp_path / "cut")
    again = run_folder.read_events(tmp_path / "cut")
    assert [e.get("ability") for e in again if e["event"] in ("evaluation", "curve")] == [before, *on_the_way, after]
    for name in ("deltas.safetensors", "batches/000002.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_run_may_score_at_its_ends_only_and_keeps_its_records(tokenizer, tmp_path):
    _write(tmp_path)

    def interrupt(event):
        if event["event"] == "curve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, tmp_path / "run", tokenizer, interrupt, harness=("rte",), harness_ends=True)
    events = run_folder.read_events(tmp_path / "run")
    assert ["ability" in e for e in events if e["event"] in ("evaluation", "curve")] == [True, False]
    _damage("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment")(tmp_path)
    with pytest.raises(RunError, match="the task rte is not as it was when"):
        experiment.resume(tiny.make_model("llama", seed=3), tokenizer, tmp_path / "run")
    with pytest.raises(ConfigError, match="task 'mmlu' is not known"):
        _run(tmp_path, tmp_path / "other", tokenizer, harness=("mmlu",))
    with pytest.raises(ValueError, match="harness_limit 3: expected harness with it"):
        _run(tmp_path, tmp_path / "other", tokenizer, harness=(), harness_data=None, harness_limit=3)
    assert not (tmp_path / "other").exists()


def test_the_published_files(asked, tokenizer):
    folder = os.environ.get("SPHERE_EDIT_DATA")
    if not folder:
        pytest.skip("SPHERE_EDIT_DATA names no folder with the shared data")
    if missing := [source.file for source in TASKS.values() if not os.path.isfile(os.path.join(folder, source.file))]:
        pytest.skip(f"{missing[0]} is not in {folder}")
    records = read_tasks(tuple(TASKS))
    assert {name: len(found) for name, found in records.items()} == {
        "boolq": 3267,
        "rte": 2489,
        "nq": 3610,
        "gsm8k": 1319,
    }
    assert records["boolq"][1]["passage"].startswith("Property tax -- Property tax or 'house tax' is a local tax")
    assert [r["label"] for r in records["rte"][:2]] == [1, 0]
    found = general_ability(tiny.make_model("llama"), tokenizer, limit=2)
    assert {name: score["n"] for scores in found.values() for name, score in scores.items()} == {
        "acc": 2,
        "exact_match": 2,
        "exact_match_strict": 2,
        "exact_match_flexible": 2,
    }
    assert asked[0] == "Answer these questions:\n\nQ: who got the first nobel prize in physics?\nA:"
    assert asked[2].count("Question: ") == 6 and "Janet’s ducks" in asked[2]
