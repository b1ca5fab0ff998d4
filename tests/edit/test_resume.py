"""A run that is killed, cut off, damaged or rolled back goes on to the same bits, or says why it cannot."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import time
from pathlib import Path

import children
import pytest
import tiny
import torch
from typer.testing import CliRunner

from sphere_edit import files
from sphere_edit.cli.app import app
from sphere_edit.data.requests import EditRequest
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments import snapshots
from sphere_edit.experiments.run import resume, rollback
from sphere_edit.model.structure import find_structure
from sphere_edit.runs import journal as journals
from sphere_edit.runs import run_folder
from sphere_edit.runs.deltas import switch
from sphere_edit.runs.journal import BATCHES, CHECKPOINTS, JOURNAL, SET_ASIDE, Journal, RunError
from sphere_edit.runs.spec import RunOptions
from sphere_kernels import LowRankUpdate

_BATCHES = 13
_SETTINGS = tiny.CONFIG.replace(contexts=1, value_steps=3, refresh_every=2)
_RESULT = (BATCHES, "deltas.safetensors")


def _facts(count: int = 2 * _BATCHES - 1) -> list[EditRequest]:
    places, words = ("river", "town", "hill", "lake", "bridge"), ("Rome", "Peru", "Ann Lee", "Welsh", "Rovers", "north")
    return [
        EditRequest(
            f"The {places[i % 5]} of {{}} is",
            f"Place {i}",
            words[i % 6],
            words[(i + 1) % 6],
            (f"Say the {places[i % 5]} of Place {i}:",),
            (f"The {places[i % 5]} of Elsewhere is",),
            id=str(i),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """``model``, ``facts.jsonl``, ``text.txt`` and a filled ``cache``."""
    base = tmp_path_factory.mktemp("resume")
    tiny.make_model("llama").save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    run_folder.write_jsonl(base / "facts.jsonl", [{k: v for k, v in vars(r).items() if v} for r in _facts()])
    (base / "text.txt").write_text("Nobody saw the river in the night. " * 12)
    return base


@pytest.fixture(autouse=True)
def shared_cache(base, own_cache, monkeypatch, request):
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("SPHERE_EDIT_CACHE", str(base / "cache"))


def _arguments(base: Path) -> list[object]:
    return [
        *("run", "--model", base / "model", "--data", base / "facts.jsonl", "--checkpoint-every", 3),
        *(
            "--set",
            "layers=[1,2,3]",
            "--batch-size",
            2,
            "--targets",
            "optimised",
            "--set",
            "value_steps=3",
            "--set",
            "contexts=1",
        ),
        *("--set", "context_length=4", "--set", "covariance_tokens=600", "--set", "null_space_threshold=0.3"),
        *("--set", "ridge=0.1", "--refresh-every", 2, "--perplexity-text", base / "text.txt"),
    ]


def _call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def _error(result) -> str:
    assert result.exit_code == 2, result.output + repr(result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def _files(run: Path, *names: str) -> dict[str, bytes]:
    """The bytes of the files under the names; of all without."""
    inside = [run / name for name in names] if names else [run]
    found = [p for path in inside for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in found if p.name != journals.LOCK}


def _same(run: Path, other: Path) -> None:
    ours, theirs = _files(run, *_RESULT), _files(other, *_RESULT)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def _events(run: Path) -> list[dict]:
    """The events without their times."""
    return [{k: v for k, v in event.items() if k != "seconds"} for event in run_folder.read_events(run)]


def _run(out: Path, tokenizer, count: int = 2 * _BATCHES - 1, stop: int | None = None, family="llama", **more):
    """A run in this process, interrupted after batch ``stop``."""

    def interrupt(event):
        if event["event"] == "batch" and event["batch"] == stop:
            raise KeyboardInterrupt

    model = tiny.make_model(family, **more)
    options = RunOptions("tiny", "facts", out, perplexity_tokens=100, checkpoint_every=3)
    try:
        experiment.run(model, tokenizer, _facts(count), _SETTINGS, options, interrupt)
    except KeyboardInterrupt:
        assert stop is not None
    return model


@pytest.fixture(scope="module")
def whole(base, tokenizer):
    """A run that was never stopped: the edited model's weights, and the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPHERE_EDIT_CACHE", str(base / "cache"))
        patch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))
        return tiny.state(_run(base / "whole", tokenizer)), base / "whole"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole[1], tmp_path / "copy"))


def _resumed(run: Path, tokenizer, family="llama", **more):
    model = tiny.make_model(family, **more)
    resume(model, tokenizer, run)
    return model


def _undisturbed(arguments: list[object], run: Path, log: Path, **how) -> float:
    """Seconds until its first batch was kept."""
    assert children.finish(children.start(log, "--help")) == 0  # the server starts but once
    begin = time.monotonic()
    process = children.start(log, *arguments, "--out", run, **how)
    children.wait_for(run / BATCHES, process)
    ready = time.monotonic() - begin
    assert children.finish(process) == 0, log.read_text()
    return ready


def _lines(run: Path) -> int:
    return (run / JOURNAL).read_bytes().count(b"\n") if (run / JOURNAL).exists() else 0


def _kill_twenty_times(arguments: list[object], run: Path, log: Path, ready: float, count: int, **how) -> None:
    """Begin a run, kill it, go on, twenty times, then let it end. The moment is anywhere while it gets ready to edit,
    or soon after it has kept one or two steps more; one, where all ``count`` batches are done and the rest is short.
    """
    seed = int.from_bytes(os.urandom(4), "big")
    draw, reached = random.Random(seed), []
    print(f"seed {seed}")
    while len(reached) < 20:
        known = _lines(run)
        done = len(list((run / BATCHES).glob("[!.]*")))
        steps = 1 if done >= count - 2 else draw.randint(1, 2)
        end = time.monotonic() + (draw.random() * ready if draw.random() < 0.5 else 60)
        more = ("run", "--resume", run) if known else [*arguments, "--out", run]
        process = children.start(log, *more, **how)
        while process.is_alive() and time.monotonic() < end and _lines(run) < known + steps:
            time.sleep(0.002)
        late = draw.random() * min(ready / 10, 0.2) if _lines(run) >= known + steps else 0.0
        assert children.kill_after(process, late), log.read_text()
        reached.append(len(list((run / BATCHES).glob("[!.]*"))))
    print("killed at batches", reached)
    assert children.finish(children.start(log, "run", "--resume", run, **how)) == 0, log.read_text()
    assert not re.search("altered|torn|Traceback", log.read_text())


def _same_to_the_end(run: Path, other: Path, at_least: int) -> None:
    _same(run, other)
    assert len(list((run / BATCHES).iterdir())) >= at_least
    # what was evaluated last is the same model; a finished run lists the same events
    assert _events(run) == _events(other)


def test_twenty_kills_at_random_moments(base, tmp_path):
    """Real processes; the optimisation draws random numbers, so that the random state counts."""
    log, undisturbed = tmp_path / "log", tmp_path / "undisturbed"
    ready = _undisturbed(_arguments(base), undisturbed, log, drawing=True)
    _kill_twenty_times(_arguments(base), tmp_path / "run", log, ready, _BATCHES, drawing=True)
    _same_to_the_end(tmp_path / "run", undisturbed, _BATCHES)


@pytest.mark.slow
def test_twenty_kills_of_a_run_on_the_demo_model(tmp_path):
    log, facts, text = tmp_path / "log", tmp_path / "facts.jsonl", tmp_path / "text.txt"
    names = ["Mali", "Peru", "Chad", "Laos", "Oman", "Cuba", "Fiji", "Iran", "Iraq", "Togo", "Niger", "Kenya"]
    made = [EditRequest("The capital of {} is", name, "Rome", id=name) for name in names]
    run_folder.write_jsonl(facts, [{k: v for k, v in vars(r).items() if v} for r in made])
    text.write_text("Nobody saw the river in the night. " * 4)
    arguments = [
        *("run", "--model", "smollm2-135m", "--data", facts, "--layers", "4,5", "--batch-size", 1),
        *(
            "--targets",
            "optimised",
            "--set",
            "value_steps=2",
            "--set",
            "contexts=1",
            "--set",
            "context_length=4",
            "--no-null-space",
        ),
        *("--set", "covariance_tokens=2000", "--perplexity-text", text, "--checkpoint-every", 4),
    ]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    ready = _undisturbed(arguments, undisturbed, log)
    _kill_twenty_times(arguments, run, log, ready, len(made))
    _same_to_the_end(run, undisturbed, len(made))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bfloat16"])
def test_stopped_after_every_batch_and_gone_on_with(family, tokenizer, quick, tmp_path):
    """In one process, each batch by another editor: with a checkpoint there, with batches after one, with none yet."""
    more = {"family": "llama", "dtype": torch.bfloat16} if family == "bfloat16" else {"family": family}
    count = 13
    model = _run(tmp_path / "whole", tokenizer, count, **more)
    expected = tiny.state(model)
    for stop in range(1, 8):
        run = tmp_path / f"run{stop}"
        _run(run, tokenizer, count, stop, **more)
        assert len(list((run / BATCHES).iterdir())) == stop
        model = _resumed(run, tokenizer, **more)
        assert tiny.same(model, expected)
        _same(run, tmp_path / "whole")
        assert _events(run) == _events(tmp_path / "whole")


_METHODS = {
    "memit": {"method": "memit", "covariance_weight": 10.0, "history": True},
    "rect": {"method": "rect", "covariance_weight": 10.0},
    "rect-batch": {"method": "rect", "covariance_weight": 10.0, "project": "batch"},
    "prune": {"method": "prune", "covariance_weight": 1e-3, "value_clamp": 400.0, "value_lr": 50.0},  # it has to prune
    "rome": {"method": "rome", "layers": (2,)},
    "revive": {"revive": 0.3},
    "anchor": {"value_anchor": 4},
    "ft": {"method": "ft", "layers": (3, 4), "ft_steps": 3, "ft_lr": 1e-2},
    "ft-breadth": {"method": "ft", "layers": (3,), "ft_steps": 2, "ft_lr": 1e-2, "ft_minibatch": 1, "ft_eos": True},
    "gradient": {"method": "ridge", "targets": "gradient", "gradient_lr": 0.3, "ridge": 1.0, "gradient_whiten": True},
    "gradient-history": {"targets": "gradient", "gradient_lr": 0.3, "gradient_preheat": 3},
}


@pytest.mark.parametrize("changes", _METHODS.values(), ids=_METHODS)
def test_every_method_goes_on_to_the_same_bits(changes, tokenizer, quick, tmp_path, monkeypatch):
    """After a checkpoint and without one; and rolled back as if it had been stopped there."""
    monkeypatch.setitem(globals(), "_SETTINGS", _SETTINGS.replace(**changes))
    expected = tiny.state(_run(tmp_path / "whole", tokenizer, 10))
    for stop in (2, 4):
        run = tmp_path / f"run{stop}"
        stopped = tiny.state(_run(run, tokenizer, 10, stop))
        assert tiny.same(_resumed(run, tokenizer), expected)
        _same(run, tmp_path / "whole")
        model = tiny.make_model("llama")
        rollback(model, tokenizer, run, stop)
        assert tiny.same(model, stopped)


def test_the_callers_random_state_and_threads_are_left_alone(whole, tokenizer, quick, tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    _run(tmp_path / "run", tokenizer, stop=2)
    torch.manual_seed(6)  # another than the first process began with
    _resumed(tmp_path / "run", tokenizer)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    _same(tmp_path / "run", whole[1])


def test_a_finished_run_is_left_as_it_is(whole, base, copy, tokenizer):
    before = _files(copy)
    model = _resumed(copy, tokenizer)
    assert tiny.same(model, whole[0]) and _files(copy) == before
    result = _call("run", "--resume", copy)
    assert result.exit_code == 0 and "finished; nothing to do" in result.stdout, result.output
    assert _files(copy) == before


@pytest.mark.parametrize("name", ["config.yaml", "requests.jsonl"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_changed_inputs_are_named_and_nothing_is_touched(name, how, copy):
    path = copy / name
    text = path.read_text()
    path.unlink()
    if how == "changed":
        path.write_text(text.replace("ridge: 0.1", "ridge: 0.2").replace("Place 3", "Place 4"))
        assert path.read_text() != text
    before = _files(copy)
    for command in (("run", "--resume", copy), ("rollback", copy, "--to-batch", 2)):
        message = _error(_call(*command))
        assert name in message
        assert "is not the one that the run was made with" in message or name == "config.yaml"
    assert _files(copy) == before


@pytest.fixture
def stopped(base, tokenizer, quick, tmp_path):
    """A run of the command's own options, stopped after four batches."""
    run = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        real = run_folder.write_batch

        def write(journal, batch):
            if batch.number == 5:
                raise KeyboardInterrupt
            real(journal, batch)

        patch.setattr(run_folder, "write_batch", write)
        result = _call(*_arguments(base), "--out", run)
    assert result.exit_code == 130
    assert f"batches kept safe: 4; go on with: sphere-edit run --resume {run}" in " ".join(result.stderr.split())
    return run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--alpha", 0.25), "alpha: the run was begun with 0.5, got 0.25"),
        (("--set", "ridge=3"), "ridge: the run was begun with 0.1, got 3"),
        (("--layers", "1,2"), r"layers: the run was begun with \[1, 2, 3\], got \[1, 2\]"),
        (("--no-sphere",), "sphere: the run was begun with True, got False"),
        (("--batch-size", 3), "batch_size: the run was begun with 2, got 3"),
        (("--limit", 3), "limit: the run was begun with None, got 3"),
        (("--preset", "gpt2-xl"), "preset: the run was begun with 'auto', got 'gpt2-xl'"),
        (("--threads", 7), r"threads: the run was begun with \d, got 7"),
        (("--dtype", "bfloat16"), "dtype: the run was begun with 'auto', got 'bfloat16'"),
        (("--device", "cuda"), "device: the run was begun with 'cpu', got 'cuda'"),
        (("--checkpoint-every", 4), "checkpoint_every: the run was begun with 3, got 4"),
        (("--perplexity-text", "heldout"), "perplexity_text: the run was begun with .*text.txt', got 'heldout'"),
        (("--save-model",), "save_model: the run was begun with False, got True"),
        (("--overwrite",), "overwrite: the run was begun with False, got True"),
        (("--out", "elsewhere"), "--out elsewhere: the run goes to .*stopped; expected that, or no --out"),
        (("--set", "nonsense=1"), "nonsense: the run was begun with None, got 1"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_other_options_than_the_runs_own_are_refused(given, message, stopped, monkeypatch):
    before = _files(stopped)
    monkeypatch.setattr("sphere_edit.model.loading.load_model", None)  # all of this is known before
    assert re.search(message, _error(_call("run", "--resume", stopped, *given)))
    assert _files(stopped) == before


def test_the_same_options_again_are_welcome(stopped, base):
    result = _call(
        *_arguments(base), "--out", stopped, "--resume", stopped, "--threads", torch.get_num_threads(), "--seed", 0
    )
    assert result.exit_code == 0, result.output
    assert "going on after batch 4" in result.stdout


def test_changed_data_is_named(stopped, base, tmp_path):
    before, lines = _files(stopped), (base / "facts.jsonl").read_text().splitlines()
    data = tmp_path / "data.jsonl"
    for changed, message in (
        ([*lines[:2], lines[2].replace("Place 2", "Place 9"), *lines[3:]], "request 3 of .*Place 9.*Place 2"),
        (lines[:-1], "request 25 of .* is none, the run was begun with"),
        ([*lines, lines[0].replace('"0"', '"x"')], "request 26 of .*begun with none"),
        ([lines[0].replace("Elsewhere", "Nowhere"), *lines[1:]], "request 1 of .* differs"),
    ):
        data.write_text("\n".join(changed))
        assert re.search(f"the data has changed: {message}", _error(_call("run", "--resume", stopped, "-d", data)))
    assert _files(stopped) == before
    data.write_text("\n".join(lines))  # the same elsewhere
    assert _call("run", "--resume", stopped, "-d", data).exit_code == 0


def test_a_changed_model_is_named(whole, copy, tokenizer, tmp_path):
    """Even where the edited weights are the same, and the change is far above them."""
    rollback(tiny.make_model("llama"), tokenizer, copy, 4)
    before = _files(copy)
    other = tiny.make_model("llama")
    other.model.layers[4].mlp.gate_proj.weight.data[0, 0] += 1e-3
    state = tiny.state(other)
    for act in (lambda: resume(other, tokenizer, copy), lambda: rollback(other, tokenizer, copy, 2)):
        with pytest.raises(RunError, match="the model is not as it was when .* began.*made with model 'tiny'"):
            act()
    assert tiny.same(other, state) and _files(copy) == before
    with pytest.raises(ValueError, match="out of range"):
        resume(tiny.make_model("llama", num_hidden_layers=3), tokenizer, copy)
    assert _files(copy) == before


def test_other_threads_and_another_machine_are_said(copy, tokenizer, monkeypatch):
    rollback(tiny.make_model("llama"), tokenizer, copy, 4)
    here, notes = run_folder.environment(), []
    monkeypatch.setattr(run_folder, "environment", lambda: here | {"torch": "9.9", "machine": "Elbrus"})
    threads = torch.get_num_threads()
    seen = []
    real = run_folder.write_batch
    monkeypatch.setattr(run_folder, "write_batch", lambda *args: (seen.append(torch.get_num_threads()), real(*args)))
    with run_folder.existing_run(copy) as journal:
        journal.on_note = notes.append
        torch.set_num_threads(threads + 1)
        try:
            resume(tiny.make_model("llama"), tokenizer, copy, journal=journal)
            assert torch.get_num_threads() == threads + 1 and set(seen) == {threads}
        finally:
            torch.set_num_threads(threads)
    assert f"{threads} threads, as the run began with, instead of {threads + 1}" in notes
    assert f"since the run began, torch was {here['torch']}, is 9.9" in notes
    assert any("is Elbrus" in note for note in notes)


def test_bits_that_come_out_different_are_refused(copy, tokenizer, monkeypatch):
    """As on another machine: the recorded sums decide, and nothing is touched."""
    from sphere_edit.editing.engine import Engine

    rollback(tiny.make_model("llama"), tokenizer, copy, 4)
    before, add = _files(copy), Engine._add

    def otherwise(self, layer, update):
        add(self, layer, LowRankUpdate(update.left * (1 + 1e-6), update.right))

    monkeypatch.setattr(Engine, "_add", otherwise)
    monkeypatch.setattr(run_folder, "environment_changes", lambda recorded: ["machine was this, is that"])
    with pytest.raises(RunError, match="000001.safetensors: .*SHA-256.*machine was this, is that"), pytest.warns():
        resume(tiny.make_model("llama"), tokenizer, copy)
    assert {k: v for k, v in _files(copy).items() if k != "metrics.jsonl"} == {
        k: v for k, v in before.items() if k != "metrics.jsonl"
    }


@pytest.mark.parametrize("number", [1, 5, 13])
def test_a_damaged_batch_is_named_and_done_again(number, copy, whole, tokenizer):
    path = copy / BATCHES / f"{number:06d}.safetensors"
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 16
    path.write_bytes(bytes(blob))
    (copy / "deltas.safetensors").unlink()
    with pytest.warns(UserWarning, match=f"{path.name} is altered.*going back to batch {number - 1}"):
        model = _resumed(copy, tokenizer)
    assert tiny.same(model, whole[0])
    _same(copy, whole[1])
    assert (copy / SET_ASIDE / "1" / BATCHES / path.name).read_bytes() == blob
    assert _events(copy) == _events(whole[1])


def test_a_finished_run_with_a_damaged_batch_still_has_its_result(copy, whole):
    """It is named where it is opened to go on; applying needs only the deltas."""
    (copy / BATCHES / "000002.safetensors").write_bytes(b"")
    fresh = tiny.make_model("llama")
    switch(copy, find_structure(fresh), "after")
    assert tiny.same(fresh, whole[0])


@pytest.mark.parametrize("damage", ["newest", "both", "gone"])
def test_damaged_checkpoints_are_passed_over(damage, copy, whole, tokenizer, recwarn):
    rollback(tiny.make_model("llama"), tokenizer, copy, 11)
    for name in {"newest": ["000009"], "both": ["000009"], "gone": []}[damage]:
        path = copy / CHECKPOINTS / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "gone":
        shutil.rmtree(copy / CHECKPOINTS)
    model = _resumed(copy, tokenizer)
    assert tiny.same(model, whole[0])
    _same(copy, whole[1])
    assert len([w for w in recwarn if "000009.safetensors is torn" in str(w.message)]) == (damage != "gone")


def test_a_damaged_look_from_before_is_taken_again(copy, whole, tokenizer):
    rollback(tiny.make_model("llama"), tokenizer, copy, 11)
    path = copy / run_folder.BEFORE
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.warns(UserWarning, match="before.json is .*; evaluating again"):
        _resumed(copy, tokenizer)
    assert _events(copy) == _events(whole[1])
    _same(copy, whole[1])


@pytest.mark.parametrize("number", range(_BATCHES + 1))
def test_rollback_is_a_run_of_so_many_batches(number, copy, whole, tokenizer, quick, tmp_path):
    expected = tiny.make_model("llama")
    if number:
        expected = _run(tmp_path / "short", tokenizer, min(2 * number, len(_facts())))
    model = tiny.make_model("llama")
    rollback(model, tokenizer, copy, number)
    assert tiny.same(model, tiny.state(expected))
    if 0 < number < _BATCHES:
        _same(copy, tmp_path / "short")
    assert (copy / "report.html").exists() == (number == _BATCHES)
    fresh = tiny.make_model("llama")
    if number:
        switch(copy, find_structure(fresh), "after")
    assert tiny.same(fresh, tiny.state(expected))
    assert [e["batch"] for e in _events(copy) if e["event"] == "batch"] == list(range(1, number + 1))
    looked = {e.get("when") for e in _events(copy) if e["event"] == "evaluation"}
    assert looked == ({"before", "after"} if number == _BATCHES else {"before"})
    if number in (0, 4, 12, 13):
        assert tiny.same(_resumed(copy, tokenizer), whole[0])
        _same(copy, whole[1])
        assert _events(copy) == _events(whole[1])


def test_the_deltas_of_a_rollback_go_when_the_run_goes_on(copy, tokenizer):
    """Otherwise apply would give an older model than the folder says."""

    def interrupt(event):
        if event["event"] == "batch" and event["batch"] == 6:
            raise KeyboardInterrupt

    rollback(tiny.make_model("llama"), tokenizer, copy, 4)
    with pytest.raises(KeyboardInterrupt):
        resume(tiny.make_model("llama"), tokenizer, copy, interrupt)
    assert Journal(copy).batches == 6
    with pytest.raises(RunError, match="is not finished .*go on with"):
        switch(copy, find_structure(tiny.make_model("llama")), "after")


def test_rollback_from_the_shell(base, stopped, tmp_path):
    result = _call("rollback", stopped, "--to-batch", 2)
    assert result.exit_code == 0, result.output
    said = result.stdout.replace("\n", "")
    assert f"{stopped} is at batch 2; what was later is in {stopped / SET_ASIDE / '1'}" in said
    assert _call("apply", stopped, "-o", tmp_path / "at2").exit_code == 0
    result = _call("rollback", stopped, "--to-batch", 2)
    assert result.exit_code == 0 and "set-aside" not in result.stdout
    for number in (3, 99):
        message = f"has batches 1 to 2; cannot roll back to batch {number}"
        assert message in _error(_call("rollback", stopped, "--to-batch", number))
    assert _call("rollback", stopped, "--to-batch", -1).exit_code == 2
    result = _call("run", "--resume", stopped)
    assert result.exit_code == 0, result.output
    assert _call("run", *_arguments(base)[1:], "--out", tmp_path / "whole").exit_code == 0
    _same(stopped, tmp_path / "whole")


def test_a_rollback_cut_off_anywhere_is_finished_by_the_next(copy, tokenizer, whole, tmp_path, monkeypatch):
    """Each of its changes to the disk is the last."""

    class Cut(BaseException):
        pass

    pristine = copy
    rolled = Path(shutil.copytree(pristine, tmp_path / "rolled"))
    rollback(tiny.make_model("llama"), tokenizer, rolled, 7)
    point = count = 0

    def cut(real):
        def call(*args, **named):
            nonlocal count
            count += 1
            if count >= point:
                raise Cut
            return real(*args, **named)

        return call

    ended = False
    while not ended:
        run = Path(shutil.copytree(pristine, tmp_path / "run"))
        point, count = point + 1, 0
        with monkeypatch.context() as patch:
            for name in ("replace", "truncate", "write", "unlink"):
                patch.setattr(os, name, cut(getattr(os, name)))
            try:
                rollback(tiny.make_model("llama"), tokenizer, run, 7)
                ended = True
            except Cut:
                ended = False
        if (run / "deltas.safetensors").exists() and not ended:  # then it holds for the batches that are there
            fresh = tiny.make_model("llama")
            switch(run, find_structure(fresh), "after")
            at = Journal(run).batches
            assert tiny.same(fresh, whole[0]) == (at == _BATCHES)
        rollback(tiny.make_model("llama"), tokenizer, run, 7)
        _same(run, rolled)
        shutil.rmtree(run)
    assert point > 10


def test_a_full_disk_is_one_line_and_the_run_goes_on(base, tmp_path, monkeypatch, whole):
    run, real, count = tmp_path / "run", files.save_file, 0

    def full(*args):
        nonlocal count
        count += 1
        if count == 6:  # the fifth batch: there is a checkpoint before
            raise files.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        message = _error(_call(*_arguments(base), "--out", run))
    assert message == (
        f"error: {run}/batches/000005.safetensors could not be written ({os.strerror(errno.ENOSPC)}); batches kept "
        f"safe: 4; go on with: sphere-edit run --resume {run}"
    )
    assert [e["batch"] for e in _events(run) if e["event"] == "batch"] == [1, 2, 3, 4]
    assert _call("run", "--resume", run).exit_code == 0
    assert _call(*_arguments(base), "--out", tmp_path / "whole").exit_code == 0
    _same(run, tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_said_before_a_model_is_loaded(base, stopped, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("sphere_edit.model.loading.load_model", None)
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    assert "cannot be written to (Read-only file system)" in _error(_call(*_arguments(base), "--out", tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    for command in (("run", "--resume", stopped), ("rollback", stopped, "--to-batch", 1)):
        assert "cannot be written to (Read-only file system)" in _error(_call(*command))


def test_a_second_process_is_refused_before_it_loads_a_model(base, stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("sphere_edit.model.loading.load_model", None)
    with run_folder.existing_run(stopped):
        for command in (
            ("run", "--resume", stopped),
            ("rollback", stopped, "--to-batch", 1),
            (*_arguments(base), "--out", stopped),
        ):
            message = _error(_call(*command))
            assert f"in use by process {os.getpid()}" in message or "unfinished run; go on with" in message
    with run_folder.new_run(tmp_path / "new"):
        message = _error(_call(*_arguments(base), "--out", tmp_path / "new"))
        assert f"in use by process {os.getpid()}" in message


def test_an_unfinished_run_says_how_to_finish_it(base, stopped, tmp_path):
    way = f"go on with: sphere-edit run --resume {stopped}"
    assert way in _error(_call(*_arguments(base), "--out", stopped))
    assert way in _error(_call("apply", stopped, "-o", tmp_path / "model"))
    assert _call("report", stopped).exit_code == 0
    for missing in ("--data", "--out"):
        given = ["--out", tmp_path / "new"] if missing == "--data" else ["--data", base / "facts.jsonl"]
        assert f"{missing} is missing; expected --data and --out, or --resume" in _error(_call("run", *given))
    assert "is not a run folder" in _error(_call("run", "--resume", tmp_path))
    assert not (tmp_path / journals.LOCK).exists()


def test_a_stopped_overwriting_run_replaces_the_earlier_in_the_end(copy, whole, tokenizer, quick, monkeypatch):
    before = _files(copy)

    def interrupt(event):
        if event["event"] == "batch" and event["batch"] == 3:
            raise KeyboardInterrupt

    options = RunOptions("tiny", "facts", copy, perplexity_tokens=100, checkpoint_every=2, overwrite=True)
    settings = _SETTINGS.replace(seed=3)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tiny.make_model("llama"), tokenizer, _facts(9), settings, options, interrupt)
    assert _files(copy) == before
    (partial,) = copy.parent.glob("copy.partial-*")
    with monkeypatch.context() as patch:  # all is done but to put it in place
        patch.setattr(run_folder, "replace_earlier", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _resumed(partial, tokenizer)
    assert _files(copy) == before
    result = _call("run", "--resume", partial)
    assert result.exit_code == 0 and f"report: {copy}" in result.stdout.replace("\n", ""), result.output
    assert run_folder.read_config(copy)["edits"] == 9 and not partial.exists()
    assert sorted(p.name for p in copy.parent.iterdir() if p.name.startswith("copy")) == ["copy"]
    assert run_folder.read_config(copy)["replaces"] == "copy"
    result = _call("run", "--resume", copy)
    assert result.exit_code == 0 and "finished" in result.stdout


def test_an_overwriting_run_that_is_resumed_by_the_command(base, stopped):
    """Also over an unfinished run, if told so."""
    earlier = _files(stopped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "write_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = _call(*_arguments(base), "--out", stopped, "--overwrite", "--limit", 4)
    (partial,) = stopped.parent.glob("stopped.partial-*")
    assert result.exit_code == 130 and f"go on with: sphere-edit run --resume {partial}" in result.stderr
    assert _files(stopped) == earlier
    result = _call("run", "--resume", partial, "--out", stopped, "--overwrite")
    assert result.exit_code == 0, result.output
    assert run_folder.read_config(stopped)["edits"] == 4 and not partial.exists()


def test_stopped_before_its_first_step_a_run_begins_anew(base, tokenizer, quick, tmp_path, monkeypatch):
    """Killed between any two of its first files: the same command works."""
    out = tmp_path / "run"
    for point in ("write_config", "write_jsonl", "file_sha256"):
        with monkeypatch.context() as patch:
            place = experiment if point == "file_sha256" else run_folder
            patch.setattr(place, point, lambda *_: (_ for _ in ()).throw(SystemError))
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # as killed, not cleaned up
            with pytest.raises(SystemError):
                _run(out, tokenizer, 3)
        assert out.is_dir() and not (out / JOURNAL).exists()
        with pytest.raises(RunError, match="not a run folder|stopped before its first step"):
            _resumed(out, tokenizer)
    _run(out, tokenizer, 3)
    assert run_folder.read_config(out)["edits"] == 3
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(snapshots, "perplexity", lambda *_: (_ for _ in ()).throw(SystemError))
        _run(tmp_path / "early", tokenizer, 3)
    _resumed(tmp_path / "early", tokenizer)
    _same(tmp_path / "early", out)
