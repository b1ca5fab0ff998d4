"""The guard: a batch that stands out is kept, left out or stopped at, bit for bit, and a resumed run decides alike."""

from __future__ import annotations

import json
from statistics import median

import pytest
import tiny
import torch
import yaml
from typer.testing import CliRunner

from sphere_edit.cli.app import app
from sphere_edit.editing.guard import BOUND, FIRST, LEAST, Guard, GuardError
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments.run import resume, rollback
from sphere_edit.runs import run_folder
from sphere_edit.runs.spec import RunOptions
from sphere_kernels import LowRankUpdate

_ONE = {"batch_size": 1}
_KINDS = pytest.mark.parametrize("targets", ["optimised", "closed_loop"])


def _sabotage(monkeypatch, editor, calls, times=100.0):
    """From here on the batches with these numbers solve for updates so many times too long; NaN for ``times`` NaN."""
    editor.prepare()
    method = type(editor._engine.method)
    solve = method.solve

    def broken(own, layer, keys, residuals):
        update = solve(own, layer, keys, residuals)
        return LowRankUpdate(times * update.left, update.right) if editor.batches + 1 in calls else update

    monkeypatch.setattr(method, "solve", broken)


def _settings(targets, guard="stop", **more):
    # So little is asked of each batch that the tiny models are edited as gently as large ones.
    gentle = {"loop_step": 0.05, "loop_rounds": 2} if targets == "closed_loop" else {"value_clamp": 0.1}
    return {"targets": targets, "guard": guard, "contexts": 0, **gentle, **_ONE, **more}


def _guard_events(events):
    return [event for event in events if event["event"] == "guard"]


@_KINDS
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_healthy_run_raises_nothing(targets, mode, make, recwarn):
    editor, plain = make(**_settings(targets, mode)), make(**_settings(targets, "off"))
    events = editor.edit(tiny.places(10)).events
    plain.edit(tiny.places(10))
    assert not _guard_events(events)
    assert not [w for w in recwarn if "stands out" in str(w.message)]
    assert tiny.same(editor.model, tiny.state(plain.model))


@_KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stop_undoes_the_batch_bit_for_bit(family, targets, make, monkeypatch):
    editor, undisturbed = make(family, **_settings(targets)), make(family, **_settings(targets))
    editor.edit(tiny.places(6))
    before, random_state = tiny.state(editor.model), torch.get_rng_state()
    with monkeypatch.context() as patch:
        _sabotage(patch, editor, {7})
        with pytest.raises(GuardError, match=r"batch 7 .*layer \d: .*usual: at most .*facts: 6;") as caught:
            editor.edit(tiny.places(8)[6:])
    assert caught.value.batch == 7 and caught.value.facts == ["6"]
    assert {one["figure"] for one in caught.value.found} >= {"step"}
    assert tiny.same(editor.model, before) and editor.batches == 6 and editor.edits == 6
    assert torch.equal(torch.get_rng_state(), random_state)
    editor.edit(tiny.places(8)[6:])
    undisturbed.edit(tiny.places(8))
    assert tiny.same(editor.model, tiny.state(undisturbed.model))


@pytest.mark.parametrize(
    ("targets", "dtype", "times"),
    [
        ("optimised", torch.float32, 100.0),
        ("optimised", torch.bfloat16, float("nan")),
        ("closed_loop", torch.float32, float("nan")),
        ("closed_loop", torch.bfloat16, 100.0),
    ],
    ids=str,
)
def test_skip_leaves_the_facts_out_and_goes_on(times, dtype, targets, make, monkeypatch):
    settings = _settings(targets, "skip", refresh_every=2)
    editor, without = make(dtype=dtype, **settings), make(dtype=dtype, **settings)
    notes = []
    editor._on_note = notes.append
    with monkeypatch.context() as patch:
        _sabotage(patch, editor, {7}, times)
        result = editor.edit(tiny.places(9))
    without.edit(tiny.places(9)[:6])
    without.edit(tiny.places(9)[7:])  # as if the batch had never been
    assert tiny.same(editor.model, tiny.state(without.model))
    assert (editor.batches, editor.edits) == (9, 9)
    (event,) = _guard_events(result.events)
    assert (event["batch"], event["action"], event["facts"]) == (7, "skipped", ["6"])
    (note,) = (note for note in notes if "left out" in note)  # others say what a batch has not learned
    assert "6" in note
    skipped = result.records[6]
    assert skipped.number == 7 and skipped.requests == ["6"] and skipped.skipped
    assert [record.number for record in result.records if record.skipped] == [7]
    assert all(len(done.keys) == 0 and len(done.update.right) == 0 for done in skipped.layers.values())
    energies = {e["batch"]: e["energy"] for e in result.events if e["event"] == "energy" and e["layer"] == 2}
    assert energies[7] == energies[6]
    json.dumps(result.events, allow_nan=False)
    assert all(update.shape == (32, 80) for update in result.updates[2])

    other = make(dtype=dtype, **settings)
    for record in result.records:
        other.replay(record)
    assert tiny.same(other.model, tiny.state(editor.model))
    ours, theirs = editor.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@_KINDS
def test_warn_keeps_what_off_does_not_look_at(targets, make, monkeypatch):
    editor, off = make(**_settings(targets, "warn")), make(**_settings(targets, "off"))
    with monkeypatch.context() as patch:
        _sabotage(patch, editor, {7})
        with pytest.warns(UserWarning, match="batch 7 stands out and was kept: .*; its facts: 6"):
            events = editor.edit(tiny.places(7)).events
    (event,) = _guard_events(events)
    assert (event["batch"], event["edits"], event["action"]) == (7, 7, "kept")
    assert editor.batches == 7
    _sabotage(monkeypatch, off, {7})
    assert not _guard_events(off.edit(tiny.places(7)).events)
    assert tiny.same(editor.model, tiny.state(off.model))


@pytest.mark.parametrize("mode", ["warn", "off"])
def test_nan_cannot_be_kept(mode, make, monkeypatch):
    editor = make(**_settings("closed_loop", mode))
    editor.edit(tiny.places(2))
    before = tiny.state(editor.model)
    _sabotage(monkeypatch, editor, {3}, float("nan"))
    with pytest.raises(FloatingPointError):
        editor.edit(tiny.places(3)[2:])
    assert tiny.same(editor.model, before)


def test_nan_stops_with_the_facts_named(make, monkeypatch):
    editor = make(**_settings("closed_loop", "stop"))
    _sabotage(monkeypatch, editor, {1}, float("nan"))
    with pytest.raises(GuardError, match="batch 1 .*NaN or infinity.*facts: 0") as caught:
        editor.edit(tiny.places(1))
    assert caught.value.found == [] and isinstance(caught.value.__cause__, FloatingPointError)


@_KINDS
def test_keys_too_long_to_be_solved_for_are_left_out(targets, make, monkeypatch):
    editor, without = make(**_settings(targets, "skip")), make(**_settings(targets, "skip"))
    editor.prepare()
    solve = editor._engine.method.solve

    def longer(layer, keys, residuals):
        return solve(layer, 1e6 * keys if editor.batches == 1 else keys, residuals)

    monkeypatch.setattr(editor._engine.method, "solve", longer)
    with pytest.warns(UserWarning, match="batch 2 stands out and was left out: the ridge .* is too small for keys"):
        editor.edit(tiny.places(3))
    without.edit([tiny.places(3)[0]])
    without.edit([tiny.places(3)[2]])
    assert tiny.same(editor.model, tiny.state(without.model))


@pytest.mark.parametrize("skipped", [False, True])
def test_errors_of_others_are_no_reason_to_skip(skipped, make, monkeypatch):
    """What cannot be recorded ends the run, also where the record is that of a batch left out."""
    editor = make(**_settings("optimised", "skip"))
    if skipped:
        _sabotage(monkeypatch, editor, {1}, float("nan"))

    def refuse(record):
        raise OSError("disk full")

    editor._on_batch = refuse
    before = tiny.state(editor.model)
    with pytest.raises(OSError, match="disk full"):
        editor.edit(tiny.places(1))
    assert tiny.same(editor.model, before) and editor.batches == 0 and editor.edits == 0


@pytest.mark.parametrize("method", ["memit", "rect", "prune", "ft"])
def test_a_batch_is_left_out_by_every_method(method, make, monkeypatch):
    editor = make(method=method, guard="skip", batch_size=2, **({"history": True} if method != "ft" else {}))
    editor.prepare()
    judge = Guard.judge

    def strict(own, events, before):
        odd = [{"figure": "energy", "layer": 2, "value": 0.5, "usual": 0.1}]
        return odd if editor.batches == 1 else judge(own, events, before)

    monkeypatch.setattr(Guard, "judge", strict)
    with pytest.warns(UserWarning, match="batch 2 stands out"):
        records = editor.edit(tiny.places(6)).records
    monkeypatch.undo()
    state, other = tiny.state(editor.model), make(method=method, guard="skip", batch_size=2, history=method != "ft")
    for record in records:
        other.replay(record)
    assert tiny.same(other.model, state)
    assert [record.skipped for record in records] == [False, True, False]


# The figures themselves


def _events(energy=100.0, step=1.0, learned=None, size=20):
    batch = {"event": "batch", "size": size, **({} if learned is None else {"learned": learned})}
    return [{"event": "energy", "layer": 4, "energy": energy, "update_norm": step, "weight_norm": 9.0}, batch]


_BEFORE = {4: {"energy": 100.0, "weight_norm": 10.0}}


def _judged(guard, **figures):
    return [(one["figure"], one["layer"]) for one in guard.judge(_events(**figures), _BEFORE)]


def test_first_batches_have_fixed_bounds():
    guard = Guard({4: 1000.0})
    for _ in range(FIRST - 1):
        assert _judged(guard, energy=100 + 999 * BOUND["energy"], step=9.99 * BOUND["step"]) == []
        assert _judged(guard, energy=100 + 1001 * BOUND["energy"]) == [("energy", 4)]
        assert _judged(guard, energy=100 - 1001 * BOUND["energy"]) == [("energy", 4)]
        assert _judged(guard, step=10.01 * BOUND["step"]) == [("step", 4)]  # of the weight as it was before
        assert _judged(guard, learned=20) == _judged(guard, learned=2) == []
        assert _judged(guard, learned=0) == [("learned", None)]
        guard.accept(_events(step=0.5), _BEFORE)
    guard.accept(_events(step=0.5), _BEFORE)
    assert _judged(guard, step=9.99 * BOUND["step"]) == [("step", 4)]


def test_later_batches_are_measured_by_median_and_mad():
    guard, steps = Guard({4: 1000.0}), [1.0, 2.0, 1.5, 4.0, 1.2, 60.0]
    for step in steps:
        guard.accept(_events(step=step), _BEFORE)
    shares = [step / 10 for step in steps]
    middle = median(shares)
    spread = max(1.4826 * median([abs(share - middle) for share in shares]), middle / 2)
    bound = 10 * (middle + 8 * spread)
    assert bound < 60
    assert _judged(guard, step=0.999 * bound) == [] and _judged(guard, step=1.001 * bound) == [("step", 4)]
    assert guard.judge(_events(step=2 * bound), _BEFORE)[0]["usual"] == pytest.approx(bound / 10)
    assert _judged(guard, energy=100 + 999 * LEAST["energy"]) == []  # however still the energy was
    assert _judged(guard, energy=100 + 1001 * LEAST["energy"]) == [("energy", 4)]


@pytest.mark.parametrize(
    ("usual", "size", "most"),  # `most`: facts learned that still stand out
    [(20, 20, 15), (15, 20, 7), (1, 1, None), (2, 2, None), (10, 10, 7), (100, 100, 79)],
)
def test_learned_facts_by_what_so_few_can_tell(usual, size, most):
    guard = Guard({4: 1000.0})
    for _ in range(FIRST):
        guard.accept(_events(learned=usual, size=size), _BEFORE)
    out = [known for known in range(size + 1) if _judged(guard, learned=known, size=size)]
    share = usual / size
    chance = (usual + 0.5) / (size + 1)
    low = share - 4 * max(share / 20, (chance * (1 - chance) / size) ** 0.5)
    assert out == [known for known in range(size + 1) if known / size < low]
    assert out == ([] if most is None else list(range(most + 1)))


def test_what_is_not_finite_stands_out_and_is_not_remembered():
    guard = Guard({4: 1000.0})
    for value in (float("nan"), float("inf")):
        found = guard.judge(_events(energy=value, step=value), _BEFORE)
        assert [(one["figure"], one["value"]) for one in found] == [("energy", None), ("step", None)]
        json.dumps(found, allow_nan=False)
        guard.accept(_events(energy=value, step=value), _BEFORE)
    assert all(len(values) == 0 for values in guard.state_dict().values())


@_KINDS
def test_state_and_replay_decide_as_without(targets, make, monkeypatch):
    editor = make(**_settings(targets, "skip"))
    _sabotage(monkeypatch, editor, {4}, float("nan"))
    with pytest.warns(UserWarning, match="batch 4 stands out"):
        records = editor.edit(tiny.places(8)).records
    monkeypatch.undo()
    loaded, replayed = make(**_settings(targets, "stop")), make(**_settings(targets, "stop"))
    loaded.load_state_dict({name: value.clone() for name, value in editor.state_dict().items()})
    for record in records:
        replayed.replay(record)
    assert len(editor._guard.state_dict()["step.2"]) == 7
    seen = [{n: v.tolist() for n, v in e._guard.state_dict().items()} for e in (editor, loaded, replayed)]
    assert seen[0] == seen[1] == seen[2]
    editor.revert()
    editor.prepare()
    assert len(editor._guard.state_dict()["step.2"]) == 0


# In a run folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))


_COUNT = 9
_RUN = tiny.CONFIG.replace(value_clamp=0.1, contexts=0, value_steps=3, **_ONE)


def _broken_solve(monkeypatch, number):
    """Batch ``number`` of any editor is sabotaged."""
    from sphere_edit.editing.engine import Engine

    solve = Engine.solve

    def broken(engine, *given):
        update = solve(engine, *given)
        return LowRankUpdate(100 * update.left, update.right) if engine.batches + 1 == number else update

    monkeypatch.setattr(Engine, "solve", broken)


def _run(out, tokenizer, guard):
    model = tiny.make_model("llama")
    options = RunOptions("tiny", "facts", out, perplexity_tokens=100, checkpoint_every=2, curve_every=7)
    experiment.run(model, tokenizer, tiny.places(_COUNT), _RUN.replace(guard=guard), options)
    return model


def _bits(run):
    return {path.name: path.read_bytes() for path in (run / "batches").iterdir()}


@pytest.mark.parametrize("then", ["skip", "warn"])
@pytest.mark.filterwarnings("ignore:batch . stands out")
def test_a_stopped_run_goes_on_with_another_guard(then, tmp_path, tokenizer, quick, monkeypatch):
    _broken_solve(monkeypatch, 7)
    whole, run = tmp_path / "whole", tmp_path / "run"
    model = _run(whole, tokenizer, then)
    with pytest.raises(GuardError, match="batches kept safe: 6; go on with: sphere-edit run --resume .* --guard skip"):
        _run(run, tokenizer, "stop")
    with pytest.raises(GuardError, match="batch 7"):  # the same decision after a resume
        resume(tiny.make_model("llama"), tokenizer, run)
    resumed = tiny.make_model("llama")
    resume(resumed, tokenizer, run, guard=then)
    assert tiny.same(resumed, tiny.state(model))
    assert _bits(run) == _bits(whole)
    events = run_folder.read_events(run)
    (change,) = [event for event in events if event["event"] == "setting"]
    assert (change["name"], change["value"], change["batch"]) == ("guard", then, 6)
    assert [e["facts"] for e in _guard_events(events)][: 1 if then == "warn" else None] == [
        ["6"]
    ]  # what follows may too
    assert yaml.safe_load((run / "config.yaml").read_text())["settings"]["guard"] == "stop"

    # back before the change the run is that of its config; after the batch, that of the change
    rollback(tiny.make_model("llama"), tokenizer, run, 8)
    again = tiny.make_model("llama")
    resume(again, tokenizer, run)
    assert tiny.same(again, tiny.state(model)) and _bits(run) == _bits(whole)
    rollback(tiny.make_model("llama"), tokenizer, run, 5)
    with pytest.raises(GuardError, match="batch 7"):
        resume(tiny.make_model("llama"), tokenizer, run)


def test_an_unknown_guard_is_refused_on_resume(tmp_path, tokenizer, quick, monkeypatch):
    _broken_solve(monkeypatch, 7)
    with pytest.raises(GuardError):
        _run(tmp_path / "run", tokenizer, "stop")
    lines = (tmp_path / "run" / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="guard: expected one of stop, skip, warn, off, got 'loud'"):
        resume(tiny.make_model("llama"), tokenizer, tmp_path / "run", guard="loud")
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == lines


def test_the_command_stops_goes_on_and_reports(tmp_path, tokenizer, monkeypatch):
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_folder.write_jsonl(
        tmp_path / "facts.jsonl", [{k: v for k, v in vars(r).items() if v} for r in tiny.places(_COUNT)]
    )
    (tmp_path / "text.txt").write_text("Nobody saw the river in the night. " * 12)
    _broken_solve(monkeypatch, 7)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(_RUN.to_dict() | {"guard": "off"}))
    run = tmp_path / "run"
    arguments = [*("run", "--model", tmp_path / "model", "--data", tmp_path / "facts.jsonl", "--out", run)]
    arguments += ["--config", settings, "--perplexity-text", tmp_path / "text.txt", "--guard", "stop"]
    stopped = CliRunner().invoke(app, [str(a) for a in arguments])
    assert stopped.exit_code == 2
    assert "error: batch 7 stands out" in stopped.stderr and f"--resume {run} --guard skip" in stopped.stderr
    done = CliRunner().invoke(app, ["run", "--resume", str(run), "--guard", "skip"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "note: batch 7 stands out and was left out" in done.stderr
    assert "guard: 1 facts were left out" in done.stdout
    page = (run / "report.html").read_text()
    assert "What the guard noticed" in page and "1 of 9 facts were left out" in page
    assert "After batch 6 the guard was set to <b>skip</b>" in page
    refused = CliRunner().invoke(app, ["run", "--resume", str(run), "--seed", "3"])
    assert refused.exit_code == 2 and "seed: the run was begun with 0" in refused.stderr
