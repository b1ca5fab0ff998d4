"""Methods of one's own: by the command, resumed, trusted or not, and names that lead to none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

import sphere_edit
from sphere_edit.cli.app import app
from sphere_edit.cli.options import settings
from sphere_edit.config import ConfigError, EditConfig, positive
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments.run import resume
from sphere_edit.methods import METHODS, Method, method_class
from sphere_edit.methods.importing import import_method
from sphere_edit.runs import run_folder

_OWN = """
from pathlib import Path

import torch
from sphere_edit.config import ConfigError, positive
from sphere_edit.methods import Method
from sphere_kernels import LowRankUpdate

Path(__file__).with_name("ran").touch()
NUMBER = 1


class NoMethod:
    settings = {}


class Ridge(Method):
    settings = {"own_ridge": positive(1.0, "λ of the solve.")}

    @classmethod
    def check(cls, config):
        if config.own_ridge > 10 and config.sphere:
            raise ConfigError(f"own_ridge: expected at most 10 with sphere, got {config.own_ridge!r}")

    def __init__(self, config, covariances):
        self._ridge = config.own_ridge

    def solve(self, layer, keys, residuals):
        system = keys @ keys.T + self._ridge * torch.eye(len(keys))
        return LowRankUpdate(residuals.T.contiguous(), torch.linalg.solve(system, keys))
"""


@pytest.fixture
def own(tmp_path, monkeypatch, tokenizer):
    """The folder one works in, with ``mine/own.py``, a model and facts; nothing of it has been imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text(_OWN)
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_folder.write_jsonl(tmp_path / "facts.jsonl", [{k: v for k, v in vars(r).items() if v} for r in tiny.places(8)])
    (tmp_path / "text.txt").write_text("Nobody saw the river in the night. " * 12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))
    _forget()
    yield tmp_path
    _forget()


def _forget():
    """As a new process begins."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def _call(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    _forget()
    return result


def _error(result):
    assert result.exit_code == 2, result.output + repr(result.exception)
    return " ".join(result.stderr[result.stderr.index("error: ") :].split())


_RUN = [
    *("run", "--model", "model", "--data", "facts.jsonl", "--set", "layers=[1,2]", "--batch-size", 2),
    *(
        "--targets",
        "optimised",
        "--set",
        "value_steps=3",
        "--set",
        "contexts=1",
        "--set",
        "context_length=4",
        "--set",
        "covariance_tokens=600",
    ),
    *("--perplexity-text", "text.txt", "--checkpoint-every", 2),
]


@pytest.fixture
def stopped(own, monkeypatch):
    """A run by the command with one's own method, stopped after three batches."""
    real = run_folder.write_batch

    def write(journal, batch):
        if batch.number == 4:
            raise KeyboardInterrupt
        real(journal, batch)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_batch", write)
        result = _call(*_RUN, "--out", "run", "--method", "mine.own:Ridge")
    assert result.exit_code == 130, result.output
    (own / "ran").unlink(missing_ok=True)
    (own / "mine" / "ran").unlink()
    return own / "run"


def test_the_command_runs_and_resumes_ones_own_method(stopped, own):
    assert run_folder.read_config(stopped)["settings"]["method"] == "mine.own:Ridge"
    result = _call(*_RUN, "--out", "whole", "--method", "mine.own:Ridge")
    assert result.exit_code == 0, result.output
    shutil.copytree(stopped, own / "other")
    for folder, how in ((stopped, ("--method", "mine.own:Ridge")), (own / "other", ("--trust-remote-code",))):
        result = _call("run", "--resume", folder, *how)
        assert result.exit_code == 0, result.output
        assert (folder / run_folder.DELTAS).read_bytes() == (own / "whole" / run_folder.DELTAS).read_bytes()
    result = _call("rollback", stopped, "--to-batch", 2, "--trust-remote-code")
    assert result.exit_code == 0, result.output


def test_code_that_only_a_file_names_is_not_run(stopped, own):
    file = own / "given.yaml"
    file.write_text("method: mine.own:Ridge\n")
    for args in (
        ("run", "--resume", stopped),
        ("rollback", stopped, "--to-batch", 2),
        (*_RUN, "--out", "new", "--config", file),
        (*_RUN, "--out", "new", "--config", stopped / run_folder.CONFIG),
    ):
        message = _error(_call(*args))
        assert "mine.own:Ridge is code that a file names; if you trust it, give --method mine.own:Ridge or" in message
        assert not (own / "mine" / "ran").exists() and not (own / "new").exists()
    with pytest.raises(ConfigError, match="mine.own:Ridge: expected mine.own to be imported before, found it is not"):
        resume(tiny.make_model("llama"), None, stopped)
    assert not (own / "mine" / "ran").exists()
    result = _call(*_RUN, "--out", "new", "--config", file, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert (own / "mine" / "ran").exists()


def test_a_run_does_not_go_on_with_other_code(stopped, own):
    path = own / "mine" / "own.py"
    path.write_text(_OWN.replace("NUMBER = 1", "NUMBER = 2"))
    message = _error(_call("run", "--resume", stopped, "--trust-remote-code"))
    assert "the method is not as it was when" in message
    path.write_text(_OWN)
    assert _call("run", "--resume", stopped, "--trust-remote-code").exit_code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mine.others:Ridge",
            r"mine.others:Ridge cannot be imported \(ModuleNotFoundError: .*mine.others.*\); expected",
        ),
        (":Ridge", "cannot be imported .* expected package.module:Class"),
        ("mine.own:Bridge", "mine.own:Bridge: expected a class made from sphere_edit.methods.Method, got None"),
        ("mine.own:NoMethod", "expected a class made from sphere_edit.methods.Method, got <class"),
        ("mine.own:NUMBER", "expected a class made from sphere_edit.methods.Method, got 1"),
        ("mine.own:Path", "expected a class made from sphere_edit.methods.Method, got <class"),
        ("os:getcwd", "expected a class made from sphere_edit.methods.Method, got <built-in"),
        (
            "mine.own.Ridge",
            "expected one of alphaedit, .*, got 'mine.own.Ridge'; your own is named package.module:Class",
        ),
    ],
)
def test_names_that_lead_to_no_method(name, message, own):
    with pytest.raises(ConfigError, match=message):
        settings("auto", None, [], {"method": name})
    with (
        pytest.raises(ConfigError, match=f"{name} is code that a file names")
        if ":" in name
        else pytest.raises(ConfigError)
    ):
        import_method(name, False)
        method_class(EditConfig(method=name))


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        (None, "batch_size", "Mine: settings: 'batch_size' is the loop's; expected another name"),
        (None, "replace", "Mine: settings: 'replace' is the loop's"),
        ("mine", "ridge", "Mine: settings: 'ridge' is a setting of alphaedit; expected another name"),
        ("mine", "loop_stop", "Mine: settings: 'loop_stop' is a setting of closed_loop"),
        ("memit", "own", "Mine: 'memit' is a method already; expected another name"),
    ],
)
def test_a_declaration_that_would_change_others_is_refused(name, key, message):
    """Such as a default of one's own for ``ridge``, which AlphaEdit would have had from then on."""
    methods, ridge = dict(METHODS), EditConfig().ridge
    with pytest.raises(ConfigError, match=message):
        type("Mine", (Method,), {"settings": {key: positive(3.0, "")}}, name=name)
    assert methods == METHODS and EditConfig().ridge == ridge


def test_a_method_that_is_made_anew_takes_its_own_place(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", None)
    del METHODS["mine"]
    for default in (3.0, 4.0):
        made = type("Mine", (Method,), {"settings": {"own": positive(default, "")}}, name="mine")
        assert METHODS["mine"] is made and EditConfig(method="mine").own == default


def test_code_that_fails_while_it_is_imported(own):
    (own / "mine" / "own.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"mine.own:Ridge cannot be imported \(ZeroDivisionError: division by zero\)"):
        settings("auto", None, [], {"method": "mine.own:Ridge"})


def test_its_own_settings_are_checked_recorded_and_resumed(stopped, own):
    assert run_folder.read_config(stopped)["settings"]["own_ridge"] == 1.0
    how = (*_RUN, "--method", "mine.own:Ridge", "--set")
    for pair, message in (
        ("own_ridge=0", "own_ridge: expected a number above 0, got 0"),
        ("own_ridge=11", "own_ridge: expected at most 10 with sphere, got 11"),
        ("own_bridge=1", "unknown setting 'own_bridge'; known settings are"),
    ):
        assert message in _error(_call(*how, pair, "--out", "new"))
    assert "own_ridge: the run was begun with 1.0, got 2" in _error(
        _call("run", "--resume", stopped, "--trust-remote-code", "--set", "own_ridge=2")
    )
    deltas = {}
    for value in ("1.0", "9"):
        assert _call(*how, f"own_ridge={value}", "--out", f"with-{value}").exit_code == 0
        deltas[value] = (own / f"with-{value}" / run_folder.DELTAS).read_bytes()
    assert _call("run", "--resume", stopped, "--trust-remote-code").exit_code == 0
    assert (stopped / run_folder.DELTAS).read_bytes() == deltas["1.0"] != deltas["9"]
    listed = _call("settings", "--method", "mine.own:Ridge")
    assert listed.exit_code == 0 and "own_ridge" in listed.stdout, listed.output


def test_a_method_is_one_file_in_the_folder_of_methods(own):
    """In a copy of the package with that file and nothing else: listed, refused where it does not fit, and run."""
    copy = shutil.copytree(Path(sphere_edit.__file__).parent, own / "copy" / "sphere_edit")
    text = _OWN.replace("class Ridge(Method):", 'class Ridge(Method, name="mine"):')
    (copy / "methods" / "mine.py").write_text(text)
    paths = os.pathsep.join(path for path in (str(own / "copy"), os.environ.get("PYTHONPATH")) if path)

    def call(*args):
        command = [sys.executable, "-m", "sphere_edit", *map(str, args)]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)

    assert "own_ridge" in call("settings", "--method", "mine").stdout
    refused = call(*_RUN, "--out", "new", "--set", "own_ridge=2")
    assert "own_ridge: alphaedit has no use for it, only mine; expected 1.0" in " ".join(refused.stderr.split())
    done = call(*_RUN, "--out", "run", "--method", "mine", "--set", "own_ridge=2")
    assert done.returncode == 0, done.stderr
    assert run_folder.read_config(own / "run")["settings"]["method"] == "mine"
