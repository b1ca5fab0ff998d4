"""The command line on a tiny model saved to disk: what it writes, and one line and status 2 for every mistake."""

from __future__ import annotations

import json
import re

import plain
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.cli.options import settings
from sphere_edit.cli.terminal import sparkline
from sphere_edit.runs import run_folder

_QUICK = [
    *("--set", "layers=[1,2,3]", "--batch-size", "2", "--set", "loop_rounds=3", "--set", "contexts=1"),
    *("--set", "context_length=4", "--set", "covariance_tokens=600", "--set", "null_space_threshold=0.3"),
]


def _call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def _error(result) -> str:
    """The one line on stderr of a run that a user can mend."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return " ".join(result.stderr[result.stderr.index("error: ") :].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """``model``, ``facts.jsonl``, ``text.txt`` and a finished run at ``run``."""
    base = tmp_path_factory.mktemp("cli")
    tiny.make_model("llama").save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    fields = ("prompt", "subject", "target_new", "target_true", "paraphrases", "neighborhood", "id")
    with (base / "facts.jsonl").open("w", encoding="utf-8") as file:
        for request in tiny.facts(4):
            file.write(json.dumps({k: getattr(request, k) for k in fields if getattr(request, k)}) + "\n")
    (base / "text.txt").write_text("Nobody saw the river in the night. " * 12)
    (base / "settings.yaml").write_text("alpha: 0.7\nseed: 3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(base / "cache"))
        result = _call(
            *("run", "-m", base / "model", "-d", base / "facts.jsonl", "-o", base / "run", "--save-model"),
            *("--config", base / "settings.yaml", "--seed", 4, "--limit", 3, "--no-null-space", *_QUICK),
            *("--perplexity-text", base / "text.txt"),
        )
    assert result.exit_code == 0, result.output
    assert "hyperspherical energy" in result.stdout and "efficacy success" in result.stdout
    assert result.stdout.rstrip().endswith("report.html")
    return base


@pytest.mark.parametrize(
    "command", ["", "run", "evaluate", "data", "harness", "energy", "report", "apply", "revert", "rollback"]
)
def test_help(command):
    result = _call(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout and not result.stderr
    if not command:
        for name in ("run", "evaluate", "data", "harness", "energy", "report", "apply", "revert", "rollback"):
            assert re.search(rf"^\s+{name}\b", result.stdout, re.M)


def test_later_settings_win(folder):
    """Preset, file, ``--set``, named options, in this order."""
    settings = run_folder.read_config(folder / "run")["settings"]
    assert settings["alpha"] == 0.7  # from the file
    assert settings["seed"] == 4  # the option, not the file
    assert settings["loop_rounds"] == 3 and settings["layers"] == [1, 2, 3]
    assert settings["null_space"] is False and settings["sphere"] is True
    assert settings["ridge"] == 10.0  # the preset
    assert run_folder.read_config(folder / "run")["edits"] == 3


def test_run_leaves_the_given_model_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert tiny.same(model, tiny.state(tiny.make_model("llama")))


def test_evaluate(folder, tmp_path):
    args = ("evaluate", folder / "run" / "model", "-d", folder / "facts.jsonl", "--limit", 3)
    result = _call(*args, "--perplexity-text", folder / "text.txt", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    assert "efficacy accuracy" in result.stdout
    got = json.loads((tmp_path / "e.json").read_text())
    after = [e for e in run_folder.read_events(folder / "run") if e["event"] == "evaluation"][-1]
    assert got["scores"] == after["scores"]
    assert got["perplexity"] == pytest.approx(after["perplexity"], rel=1e-5)


def test_energy(folder, tmp_path):
    result = _call("energy", folder / "model", "--eta", 0.3, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    got = json.loads((tmp_path / "e.json").read_text())
    assert [row["layer"] for row in got["layers"]] == [0, 1, 2, 3, 4]
    first = next(e for e in run_folder.read_events(folder / "run") if e["event"] == "energy" and e["layer"] == 2)
    row = got["layers"][2]
    assert row["energy"] == pytest.approx(first["energy"], rel=1e-6) and (row["n"], row["d"]) == (32, 80)
    assert sum(row["eigenvalues"]) == pytest.approx(1, abs=1e-4)
    below = sum(row["eigenvalues"][: row["rank"] - 1])
    assert below <= 0.3 + 1e-5 < below + row["eigenvalues"][row["rank"] - 1] + 2e-5


def test_report_is_made_anew(folder):
    path = folder / "run" / "report.html"
    path.unlink()
    result = _call("report", folder / "run")
    assert result.exit_code == 0, result.output
    assert path.is_file()


def test_apply_and_revert(folder, tmp_path):
    result = _call("apply", folder / "run", "-m", folder / "model", "-o", tmp_path / "edited")
    assert result.exit_code == 0, result.output
    assert "3 weights as they were after the run" in " ".join(result.stdout.split())
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert tiny.same(edited, tiny.state(AutoModelForCausalLM.from_pretrained(folder / "run" / "model")))
    result = _call("revert", folder / "run", "-m", tmp_path / "edited", "-o", tmp_path / "back")
    assert result.exit_code == 0, result.output
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert tiny.same(back, tiny.state(tiny.make_model("llama")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == tiny.VOCABULARY
    again = _call("apply", folder / "run", "-m", tmp_path / "edited", "-o", tmp_path / "twice")
    assert "already applied" in _error(again)
    assert "exists; expected a new folder" in _error(
        _call("apply", folder / "run", "-m", folder / "model", "-o", tmp_path / "back")
    )
    assert sorted(p.name for p in tmp_path.iterdir() if "cache" not in p.name) == ["back", "edited"]


def _bad_line(base, out):
    path = out.parent / "bad.jsonl"
    path.write_text((base / "facts.jsonl").read_text(encoding="utf-8") + '{"prompt": "no place"', encoding="utf-8")
    return "-d", path


_MISTAKES = {
    "data-line": (_bad_line, "bad.jsonl.*line 5"),
    "no-data": (lambda base, out: ("-d", base / "none.jsonl"), "none.jsonl: no such file"),
    "unknown-setting": (lambda base, out: ("--set", "nonsense=1"), "unknown setting 'nonsense'"),
    "setting-without-value": (lambda base, out: ("--set", "alpha"), "--set alpha: expected NAME=VALUE"),
    "setting-of-wrong-kind": (lambda base, out: ("--set", "alpha=much"), "alpha: expected a number from 0 to 1"),
    "setting-not-yaml": (lambda base, out: ("--set", "alpha=[1"), "alpha"),
    "layers-not-numbers": (lambda base, out: ("--layers", "1,two"), "layers: expected block numbers"),
    "layers-out-of-range": (lambda base, out: ("--layers", "1,9"), "9 is out of range, the model has 5"),
    "layers-setting": (lambda base, out: ("--set", "layers=3"), "layers: expected a list of block numbers"),
    "alpha": (lambda base, out: ("--alpha", "1.5"), "alpha: expected a number from 0 to 1, got 1.5"),
    "subspace": (lambda base, out: ("--subspace", "past"), "subspace: expected one of current, pretrained"),
    "directions": (lambda base, out: ("--directions", "near"), "directions: expected one of exact, tracked"),
    "preset": (lambda base, out: ("--preset", "llama9"), "preset 'llama9' is not known"),
    "model": (lambda base, out: ("-m", base / "nothing"), "nothing' cannot be loaded"),
    "dtype": (lambda base, out: ("--dtype", "int8"), "dtype: expected auto, float32"),
    "config-missing": (lambda base, out: ("--config", base / "none.yaml"), "none.yaml"),
    "config-not-settings": (lambda base, out: ("--config", base / "text.txt"), "expected settings"),
    "text": (lambda base, out: ("--covariance-text", "none.txt"), "'none.txt': no such file"),
    "perplexity-text": (lambda base, out: ("--perplexity-text", "none.txt"), "'none.txt': no such file"),
    "device": (lambda base, out: ("--device", "toaster"), "toaster"),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_mistake_is_one_line_and_status_2(mistake, folder, tmp_path):
    args, message = _MISTAKES[mistake]
    out = tmp_path / "out"
    base = ["run", "-m", folder / "model", "-d", folder / "facts.jsonl", "-o", out, *_QUICK]
    assert re.search(message, _error(_call(*base, *args(folder, out))))
    assert not out.exists()


def test_existing_run(folder, tmp_path):
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    args = ("run", "-m", folder / "model", "-d", folder / "facts.jsonl", *_QUICK)
    assert "--overwrite to replace it" in _error(_call(*args, "-o", folder / "run"))
    assert "is not a run folder" in _error(_call(*args, "-o", folder / "model", "--overwrite"))
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def _contradicting(base, path):
    """The facts, and after the first another target for it."""
    facts = [json.loads(line) for line in (base / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    other = {**facts[0], "id": "other", "target_new": "Oslo"}
    path.write_text("".join(json.dumps(fact) + "\n" for fact in (facts[0], other, *facts[1:])), encoding="utf-8")
    return path


def test_contradictions_are_left_out_and_named_or_refused(folder, tmp_path):
    data = _contradicting(folder, tmp_path / "facts.jsonl")
    args = ["run", "-m", folder / "model", "-d", data, "-o", tmp_path / "run", *_QUICK]
    message = _error(_call(*args, "--on-conflict", "refuse"))
    assert re.search(r"batch 0 .*'capital' and 'other' contradict each other", message)
    assert not (tmp_path / "run").exists()
    result = _call(*args)
    assert result.exit_code == 0, result.output
    assert re.search(r"note: 1 of 5 requests contradict .*left out: 'other'", " ".join(result.stderr.split()))
    kept = run_folder.read_requests(tmp_path / "run")
    assert [r.id for r in kept] == [r.id for r in tiny.facts(4)]
    again = ["run", "--resume", tmp_path / "run", "-d", data]
    assert _call(*again).exit_code == 0
    assert _call(*again, "--on-conflict", "skip").exit_code == 0
    message = _error(_call(*again, "--on-conflict", "refuse"))
    assert "on_conflict: the run was begun with 'skip', got 'refuse'" in message
    earlier = ["run", "--resume", folder / "run", "-d"]
    assert _call(*earlier, folder / "facts.jsonl", "--limit", 3).exit_code == 0


def test_data_shows_how_a_file_is_read(folder, tmp_path):
    data = _contradicting(folder, tmp_path / "facts.jsonl")
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**json.loads(data.read_text(encoding="utf-8").splitlines()[2]), "id": "twice"}))
    result = _call("data", data)
    assert result.exit_code == 0 and not result.stderr, result.output
    shown = " ".join(result.stdout.split())
    for expected in (
        "schema │ plain",
        "requests │ 6",
        "contradictions │ 1",
        "asked again │ 1",
        "fields not read │ none",
    ):
        assert expected in shown, result.stdout
    assert "'capital' and 'other'" in shown and "'twice' is " in shown
    first = tiny.facts(1)[0]
    assert repr(first.subject) in shown and repr(first.target_new) in shown
    zsre = {"subject": "Oka", "src": "Where is Oka?", "answers": ["Rome"], "pred": "x"}
    odd = tmp_path / "zsre.jsonl"
    odd.write_text("".join(json.dumps({**zsre, "subject": name}) + "\n" for name in ("Oka", "[b]", "Ob")))
    shown = " ".join(_call("data", odd, "--limit", 1).stdout.split())
    assert "schema │ zsRE" in shown and "no edits, left out │ 2" in shown and "'[b]'" in shown
    assert "fields not read │ pred" in shown and "'Where is {}?'" in shown
    assert "none.jsonl: no such file" in _error(_call("data", tmp_path / "none.jsonl"))


@pytest.mark.parametrize("command", ["report", "apply", "revert"])
def test_no_run_folder(command, folder, tmp_path):
    more = () if command == "report" else ("-m", folder / "model", "-o", tmp_path / "out")
    assert "not a run folder" in _error(_call(command, tmp_path / "nothing", *more))


def test_model_with_nan(folder, tmp_path, tokenizer):
    model = tiny.make_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    out = tmp_path / "out"
    message = _error(_call("run", "-m", tmp_path / "nan", "-d", folder / "facts.jsonl", "-o", out, *_QUICK))
    assert "layers.2.mlp.down_proj.weight" in message and not out.exists()
    _error(_call("energy", tmp_path / "nan"))


def test_interrupt_is_status_130(folder, tmp_path, monkeypatch):
    from sphere_edit.experiments import snapshots

    monkeypatch.setattr(snapshots, "perplexity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = _call("run", "-m", folder / "model", "-d", folder / "facts.jsonl", "-o", tmp_path / "out", *_QUICK)
    assert result.exit_code == 130 and "interrupted" in result.stderr and "Traceback" not in result.output
    assert f"go on with: sphere-edit run --resume {tmp_path / 'out'}" in result.stderr


def test_ways_out_of_a_start_that_failed(folder, tmp_path):
    """A setting that only the covariance shows to be wrong: going on would meet it again."""
    out = tmp_path / "out"
    run = ["run", "-m", folder / "model", "-d", folder / "facts.jsonl", "-o", out, *_QUICK]
    wrong, way = ("--set", "null_space_threshold=1e-9"), f"go on with: sphere-edit run --resume {out}"
    failed = _call(*run, *wrong)
    assert "expected a larger threshold" in _error(failed)
    said = " ".join(failed.stderr.split())
    assert f"batches kept safe: 0; {way}; or, to change a setting, begin anew with --overwrite" in said
    assert f"{out} holds an unfinished run; {way}; or give --overwrite to begin anew" in _error(_call(*run))
    assert "expected a larger threshold" in _error(_call("run", "--resume", out))
    _error(_call(*run, *wrong, "--overwrite"))
    (left,) = tmp_path.glob("out.partial-*")
    result = _call(*run, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (
        f"note: {left} holds an unfinished run; go on with: sphere-edit run --resume {left}; or remove it"
        in " ".join(result.stderr.split())
    )
    assert (out / run_folder.REPORT).is_file()
    assert f"(not finished: {left})" in " ".join(_call("run", "--resume", out).stdout.split())


def test_dtype_option(folder, tmp_path):
    result = _call("energy", folder / "model", "--dtype", "bfloat16", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    weight = tiny.make_model("llama").model.layers[0].mlp.down_proj.weight.detach().to(torch.bfloat16)
    got = json.loads((tmp_path / "e.json").read_text())["layers"][0]["energy"]
    assert got == pytest.approx(plain.energy(weight), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "drawn"), [([], ""), ([0.0, 0.0], ""), ([4, 2, 0], "█▄ "), ([1.0] * 100, "█" * 24), ([8, 1], "█▁")]
)
def test_sparkline(values, drawn):
    assert sparkline(values) == drawn


def test_a_run_in_another_dtype_is_applied_in_it(folder, tmp_path):
    base = ["-m", folder / "model", "-d", folder / "facts.jsonl", "-o", tmp_path / "run", *_QUICK]
    assert _call("run", *base, "--dtype", "bfloat16").exit_code == 0
    applied = _call("apply", tmp_path / "run", "-m", folder / "model", "-o", tmp_path / "edited")
    assert applied.exit_code == 0, applied.output
    reverted = _call("revert", tmp_path / "run", "-m", tmp_path / "edited", "-o", tmp_path / "back")
    assert reverted.exit_code == 0, reverted.output


def test_exponents_without_a_point_are_numbers():
    assert settings("auto", None, ["loop_step=1e-3"], {}).loop_step == 1e-3
