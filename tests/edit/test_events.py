"""Events: a run writes no other than those declared, and files of a later schema are refused."""

from __future__ import annotations

import json

import pytest
import tiny

from sphere_edit.events import KINDS, SCHEMA, check_event
from sphere_edit.experiments import run as experiment
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import RunError
from sphere_edit.runs.spec import RunOptions

_RUNS = {
    "optimised": {"revive": 0.1, "directions": "tracked", "energy_s": 2.0},
    "anchored": {"value_anchor": 2, "contexts": 0},
    "closed loop": {"targets": "closed_loop", "loop_rounds": 2},
    "gradient": {"targets": "gradient", "method": "ridge"},
    "prune": {"method": "prune", "prune_in": "copies"},
    "ft": {"targets": "closed_loop", "method": "ft", "ft_steps": 2},
}


@pytest.mark.parametrize("changes", _RUNS.values(), ids=_RUNS)
def test_a_run_says_only_what_is_declared(changes, config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "write_report", lambda run: (run / "report.html").write_text("<html>"))
    monkeypatch.setattr("sphere_edit.targets.others.world_facts", lambda seed: tiny.facts(4)[2:])
    options = RunOptions("tiny", "facts", tmp_path / "run", perplexity_tokens=100, curve_every=1)
    experiment.run(tiny.make_model("llama"), tokenizer, tiny.facts(3), config.replace(**changes), options)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for event in written:
        check_event(event)
    assert (
        written[0] == {"event": "schema", "version": SCHEMA} and run_folder.read_events(tmp_path / "run") == written[1:]
    )
    assert {event["event"] for event in written} == KINDS.keys() - {"guard", "setting"}


def test_what_is_not_declared_is_refused():
    setting = {"event": "setting", "batch": 1, "name": "guard", "value": "off"}
    check_event(setting)
    for event, message in (
        ({"event": "settings"}, "event 'settings' is unknown; expected one of schema, "),
        (setting | {"was": 1}, "event 'setting' has no field 'was'; expected of batch, name, value"),
        ({k: v for k, v in setting.items() if k != "name"}, "event 'setting' lacks its field 'name'"),
        (setting | {"batch": 1.0}, "event 'setting': batch must be int, got 1.0"),
        (setting | {"batch": True}, "event 'setting': batch must be int, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            check_event(event)


def test_a_later_schema_is_refused_and_an_earlier_file_is_read(tmp_path):
    path, event = tmp_path / "metrics.jsonl", {"event": "finished", "seconds": 1.0}
    path.write_text(json.dumps(event) + "\n")
    assert run_folder.read_events(tmp_path) == [event]
    for version in (SCHEMA + 1, None):
        path.write_text(json.dumps({"event": "schema", "version": version}) + "\n")
        with pytest.raises(RunError, match=f"has schema {version}, of a later version; expected at most {SCHEMA}"):
            run_folder.read_events(tmp_path)
