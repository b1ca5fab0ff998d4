"""A whole run: the folder is complete, or what was there before is untouched."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from sphere_edit.config import EditConfig
from sphere_edit.data.requests import EditRequest, RequestError
from sphere_edit.evaluation.metrics import evaluate, perplexity
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments import snapshots
from sphere_edit.experiments.snapshots import sample_prompts
from sphere_edit.model.generation import complete
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import RunError
from sphere_edit.runs.spec import RunOptions

_FILES = {"config.yaml", "requests.jsonl", "before.json", "journal.jsonl", "batches", "lock"}
_FILES |= {"metrics.jsonl", "deltas.safetensors", "report.html"}


@pytest.fixture
def edit(tokenizer, config, tmp_path):
    """Run three edits on a fresh model; the model and the folder."""

    def build(family="llama", requests=None, out="run", config=config, **options):
        model = tiny.make_model(family)
        options = RunOptions("tiny", "facts", tmp_path / out, **{"perplexity_tokens": 300, **options})
        experiment.run(model, tokenizer, tiny.facts(3) if requests is None else requests, config, options)
        return model, tmp_path / out

    return build


@pytest.fixture
def quick_report(monkeypatch):
    monkeypatch.setattr(experiment, "write_report", lambda run: (run / "report.html").write_text("<html>"))


def _contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_folder_is_complete_and_readable(edit, config, tokenizer, tmp_path):
    model, run = edit(save_model=True)
    assert {p.name for p in run.iterdir()} == _FILES | {"model"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("run")] == ["run"]
    saved = run_folder.read_config(run)
    assert EditConfig.from_dict(saved["settings"]) == config
    assert (saved["model"], saved["data"], saved["edits"]) == ("tiny", "facts", 3)
    assert saved["environment"]["torch"] == torch.__version__
    requests = [json.loads(line) for line in (run / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["id"], r["subject"]) for r in requests] == [(r.id, r.subject) for r in tiny.facts(3)]
    events = run_folder.read_events(run)
    kinds = [e["event"] for e in events]
    assert kinds.count("evaluation") == 2 and kinds.count("batch") == 2 and kinds.count("request") == 3
    assert kinds.count("energy") == 9 and kinds.count("spectrum") == 6 and kinds[-1] == "finished"
    samples = {e["kind"] for e in events if e["event"] == "sample"}
    assert samples == {"edited", "paraphrase", "neighbor", "neutral"}
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")[:500].lower()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert tiny.same(loaded, tiny.state(model))


def test_evaluations_are_of_the_model_before_and_after(edit, tokenizer, quick_report):
    model, run = edit()
    events = run_folder.read_events(run)
    before, after = (e for e in events if e["event"] == "evaluation")
    for event, of in ((before, tiny.make_model("llama")), (after, model)):
        assert event["scores"] == evaluate(of, tokenizer, tiny.facts(3)).to_dict()
        assert event["perplexity"] == pytest.approx(perplexity(of, tokenizer, "heldout", 300), rel=1e-6)
    assert (before["when"], after["when"]) == ("before", "after") and before["perplexity"] != after["perplexity"]
    for event, request in zip((e for e in events if e["event"] == "request"), tiny.facts(3), strict=True):
        assert event["id"] == request.id and "efficacy_accuracy" in event["before"]
    ranks = [e["rank"] for e in events if e["event"] == "spectrum"]
    assert all(0 < rank < tiny.HIDDEN for rank in ranks)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["write_report", "complete"])
def test_failure_leaves_the_earlier_run(where, error, edit, quick_report, monkeypatch):
    _, run = edit()
    before = _contents(run)

    def fail(*_, **__):
        raise error("cut")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots if where == "complete" else experiment, where, fail)
        with pytest.raises(error):
            edit(requests=tiny.facts(1), overwrite=True)
    assert _contents(run) == before
    edit(requests=tiny.facts(1), overwrite=True)  # what the failed run left does not stand in the way, and stays
    assert run_folder.read_config(run)["edits"] == 1
    (unfinished,) = run.parent.glob("run.*")
    assert unfinished.name.startswith("run.partial-")
    assert (unfinished / run_folder.DELTAS).is_file() == (where == "write_report")  # kept as soon as there are edits


def test_failure_in_a_batch_keeps_those_before(edit, quick_report, monkeypatch, tmp_path):
    from sphere_edit.editing.engine import Engine

    calls, add = [], Engine._add

    def failing(self, layer, update):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(self, layer, update)

    monkeypatch.setattr(Engine, "_add", failing)
    with pytest.raises(KeyboardInterrupt):
        edit()
    run = tmp_path / "run"
    assert [e["batch"] for e in run_folder.read_events(run) if e["event"] == "batch"] == [1]
    assert [p.name for p in (run / "batches").iterdir()] == ["000001.safetensors"]
    assert not (run / run_folder.DELTAS).exists()
    with pytest.raises(RunError, match="unfinished run; go on with: sphere-edit run --resume"):
        edit()


def test_overwrite(edit, quick_report, tmp_path):
    _, run = edit()
    before = _contents(run)
    with pytest.raises(RunError, match="exists; expected a new path, or --overwrite"):
        edit(requests=tiny.facts(2))
    assert _contents(run) == before
    edit(requests=tiny.facts(2), overwrite=True)
    assert run_folder.read_config(run)["edits"] == 2
    (tmp_path / "empty").mkdir()
    edit(out="empty", requests=tiny.facts(1))
    assert (tmp_path / "empty" / "config.yaml").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for out in ("mine", "file"):
        with pytest.raises(RunError, match="exists and is not a run folder"):
            edit(out=out, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    edit(out="deep/er/run", requests=tiny.facts(1))
    assert (tmp_path / "deep" / "er" / "run" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"requests": []}, ValueError, "facts: no requests"),
        ({"perplexity_text": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
        ({"config": EditConfig(layers=(4,))}, ValueError, "last block"),
        ({"config": EditConfig(layers=(1,), covariance_text="nowhere.txt")}, FileNotFoundError, "nowhere.txt"),
        (
            {"requests": [EditRequest("{} is", "x", "a", id="1"), EditRequest("{} is", "x", "b", id="2")]},
            RequestError,
            "contradict",
        ),
    ],
    ids=["no-requests", "perplexity-text", "layers", "covariance-text", "contradiction"],
)
def test_bad_input_before_anything_is_written(changes, error, message, edit, tmp_path):
    with pytest.raises(error, match=message):
        edit(**changes)
    assert not list(tmp_path.glob("run*"))


def test_completions_do_not_depend_on_the_others(tokenizer):
    model = tiny.make_model("llama")
    model.train()
    prompts = [p for _, p in sample_prompts(tiny.facts(6))]
    together = complete(model, tokenizer, prompts, 6)
    assert together == [complete(model, tokenizer, [p], 6)[0] for p in prompts]
    assert model.training
    ids = tokenizer(prompts[0])["input_ids"]
    for _ in range(6):
        ids = [*ids, model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()]
    assert tokenizer.decode(ids[-6:], skip_special_tokens=True) == together[0]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
def test_sample_prompts(count):
    prompts = sample_prompts(tiny.facts(count))
    kinds = [kind for kind, _ in prompts]
    assert kinds.count("edited") == min(count, 4) and kinds.count("neutral") == 3
    assert prompts[0] == ("edited", "The capital of Vanuatu is")
    assert ("neighbor", "The capital of Spain is") in prompts


def test_completions_with_a_tokenizer_that_appends_end_of_text(tokenizer):
    model, prompts = tiny.make_model("llama"), ["The capital of Spain is", "We"]
    assert complete(model, tiny.make_tokenizer(eos=True), prompts, 6) == complete(model, tokenizer, prompts, 6)


def test_completions_of_mixed_lengths_in_every_family(family, tokenizer):
    """Padding on the left must not reach the shorter prompt, whatever the family does with positions."""
    model, prompts = tiny.make_model(family), ["The capital of Spain is", "We"]
    assert complete(model, tokenizer, prompts, 5) == [complete(model, tokenizer, [p], 5)[0] for p in prompts]


def test_overwrite_spares_what_is_not_a_run(edit, quick_report, tmp_path):
    """A folder with a config.yaml of its own, and folders with names like ours, are the user's."""
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.partial").mkdir()
    project = tmp_path / "run"
    project.mkdir()
    (project / "config.yaml").write_text("hydra: {}")
    (project / "thesis.tex").write_text("years of work")
    for name in ("thesis.tex", "config.yaml"):
        with pytest.raises(RunError, match="not a run folder|another version"):
            edit(overwrite=True)
        (project / name).unlink()
    edit(overwrite=True)
    assert (tmp_path / "run.old").is_dir() and (tmp_path / "run.partial").is_dir()


def test_a_folder_that_appears_meanwhile_is_spared(edit, quick_report, monkeypatch, tmp_path):
    """It is not a run that --overwrite was to replace; the new one stays beside it, complete."""
    edit()
    complete = snapshots.complete

    def slow(*args):
        (tmp_path / "run" / "notes.txt").write_text("mine")
        return complete(*args)

    monkeypatch.setattr(snapshots, "complete", slow)
    with pytest.raises(RunError, match="notes.txt"):
        edit(overwrite=True, requests=tiny.facts(1))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine" and run_folder.read_config(tmp_path / "run")[
        "edits"
    ] == 3
    (beside,) = tmp_path.glob("run.partial-*")
    assert run_folder.read_config(beside)["edits"] == 1 and (beside / run_folder.DELTAS).is_file()
