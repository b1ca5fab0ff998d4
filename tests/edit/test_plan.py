"""A dry run: it says what a run does and takes, finds what a run would refuse, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import tiny
from safetensors import safe_open
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.experiments import plan
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments.plan import make_plan
from sphere_edit.runs import run_folder
from sphere_edit.runs.spec import RunOptions

_QUICK = [
    *("--layers", "1,2,3", "--batch-size", "2", "--set", "contexts=0", "--set", "covariance_tokens=600"),
    *("--set", "null_space_threshold=0.3", "--set", "loop_arithmetic=model"),
]


@pytest.fixture
def files(tmp_path, tokenizer):
    """A folder with a model and its facts."""
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fields = ("prompt", "subject", "target_new", "target_true", "id")
    lines = [{k: getattr(r, k) for k in fields if getattr(r, k)} for r in tiny.facts(3)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def _run(files, *more):
    args = ["run", "-m", files / "model", "-d", files / "facts.jsonl", "-o", files / "run", *_QUICK, *more]
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200"})


def _said(result) -> str:
    return " ".join(result.output.split())


def _traces(folder):
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_dry_run_says_what_the_run_does_and_leaves_no_trace(files):
    before = _traces(files)
    result = _run(files, "--dry-run", "--curve-every", 1, "--curve-answers", 2)
    assert result.exit_code == 0, result.output
    assert _traces(files) == before
    said = _said(result)
    for expected in (
        "3 in 2 batches of 2, the last of 1",
        "model.layers.2.mlp.down_proj [32, 80]",
        "closed_loop: up to 8 rounds",
        "covariance of keys of layers 1, 2, 3: 768 tokens of builtin",
        "3 requests before and after",
        "2 times on the way",
        "with the model's own answers to 2",
        "without the answers",
        "2 to 9 passes a fact",
        "nothing stands in the way",
    ):
        assert expected in said, result.output
    assert _run(files).exit_code == 0
    events = run_folder.read_events(files / "run")
    assert [e["batch"] for e in events if e["event"] == "batch"] == [1, 2]
    assert max(e["rounds"] for e in events if e["event"] == "batch") <= 8
    for moment in (files / "cache" / "covariance").glob("*[!h].safetensors"):
        with safe_open(moment, "pt") as file:
            assert file.metadata()["tokens"] == "768"
    again = _run(files, "--dry-run", "--overwrite")
    assert again.exit_code == 0 and "covariances of keys are in the cache" in _said(again)


def test_every_problem_is_named_at_once(files):
    (files / "run").mkdir()
    (files / "run" / "thesis.tex").write_text("")
    with (files / "facts.jsonl").open("a") as file:
        file.write('{"prompt": "no place"')
    before = _traces(files)
    result = _run(files, "--dry-run", "--layers", "1,9")
    assert result.exit_code == 1 and _traces(files) == before
    for expected in ("it has thesis.tex", "line 4", "9 is out of range, the model has 5"):
        assert expected in _said(result), result.output
    for wrong in (("--alpha", 2), ("--resume", files / "run")):
        result = _run(files, "--dry-run", *wrong)
        assert result.exit_code == 1 and "error: " in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_too_little_room(what, files, monkeypatch):
    if what == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    else:
        monkeypatch.setattr(plan, "_free_memory", lambda device: ("on this machine", 1000))
    result = _run(files, "--dry-run")
    assert result.exit_code == 1 and f"error: {what}: about " in _said(result) and "1 kB free" in _said(result)


_KINDS = {
    "closed_loop": {"targets": "closed_loop"},
    "gradient": {"targets": "gradient", "null_space": False},
    "rect": {"method": "rect"},
    "memit": {"method": "memit", "history": True},
    "ft": {"method": "ft", "ft_steps": 2, "layers": (1,)},
}


@pytest.mark.parametrize("kind", _KINDS)
def test_files_are_as_large_as_was_said(kind, tokenizer, config, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "write_report", lambda run: None)
    monkeypatch.setattr(plan, "_LONG", 0.0)  # one fact is timed
    config, model = config.replace(**_KINDS[kind]), tiny.make_model("llama")
    options = RunOptions("tiny", "facts", tmp_path / "run", perplexity_tokens=300, checkpoint_every=1, save_model=True)
    editor = SphereEditor(model, tokenizer, config)
    before = tiny.state(model)
    planned = make_plan(editor, tiny.facts(6), options)
    assert tiny.same(model, before) and not planned.problems
    said = plan._disk(editor, tiny.facts(6), options)
    experiment.run(model, tokenizer, tiny.facts(6), config, options)
    run = tmp_path / "run"
    found = {name: _size(run / name) for name in ("batches", "model")} | {"deltas": _size(run / run_folder.DELTAS)}
    heads = 3 * 15_000  # of each batch: the random state, names
    assert said["batches"] <= found["batches"] <= said["batches"] + heads
    assert found["deltas"] == pytest.approx(said["deltas"], rel=0.1)
    assert found["model"] == pytest.approx(said["model"], rel=0.7)  # the tokenizer is with it
    (*_, newest) = sorted((run / "checkpoints").iterdir())
    assert said["checkpoints"] / 3 * 0.5 < newest.stat().st_size < said["checkpoints"] / 3 + 15_000


def _size(path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
