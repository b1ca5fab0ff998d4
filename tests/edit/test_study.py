"""Studies: what is made, what goes on after a stop, and what the tables and plots are made of."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import tiny
import yaml

from sphere_edit.config import ConfigError, EditConfig
from sphere_edit.data.requests import EditRequest
from sphere_edit.evaluation.answers import ANSWER_SCORES, FOLLOWING_ANSWER_SCORES, evaluate_answers
from sphere_edit.evaluation.metrics import SCORES, evaluate
from sphere_edit.events import Event
from sphere_edit.experiments import run as experiment
from sphere_edit.experiments import snapshots
from sphere_edit.experiments.study import Study, finished, go, slug
from sphere_edit.experiments.study_results import (
    _FURTHER_PANELS,
    _difference_of_first,
    _differences,
    _without_sphere,
    collect,
    plots,
    tables,
    write_results,
)
from sphere_edit.report.page import write_report
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import RunError, locked

_SETTINGS = {
    **{
        "layers": [1, 2],
        "batch_size": 2,
        "targets": "optimised",
        "value_steps": 2,
        "contexts": 0,
        "covariance_tokens": 600,
    },
    **{"null_space_threshold": 0.3, "ridge": 0.1},
}


@pytest.fixture
def facts():
    """Nine facts, among them all of `tiny.facts`."""
    more = [EditRequest("The capital of {} is", f"Land {i}", "Rome", "Paris", id=f"land {i}") for i in range(3)]
    return tiny.facts(6) + more


@pytest.fixture
def write(tmp_path, tokenizer, facts, monkeypatch):
    """A study's file, its model and data beside it; fields that are given replace those."""
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_folder.write_jsonl(tmp_path / "facts.jsonl", [vars(fact) for fact in facts])
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setattr(experiment, "write_report", lambda folder: (folder / "report.html").write_text("<html>"))

    def make(**given):
        fields = {
            "title": "tiny",
            "model": "$HERE/model",
            "data": "$HERE/facts.jsonl",
            "curve_every": 2,
            "curve_sample": 3,
            "checkpoint_every": 2,
            "settings": _SETTINGS,
            "runs": {"AlphaEdit": {"sphere": False}, "AlphaEdit + SPHERE": {}, "FT": {"method": "ft", "ft_steps": 2}},
        }
        fields = {name: value for name, value in {**fields, **given}.items() if value is not None}
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False))
        return path

    return make


def _plain(found: dict) -> dict:
    """Without times."""
    return json.loads(
        json.dumps({name: {k: v for k, v in run.items() if k != "seconds"} for name, run in found["runs"].items()})
    )


def test_runs_are_made_once_and_compared(write, tmp_path):
    one = Study.read(write())
    said: list[str] = []
    go(one, tmp_path / "runs", say=said.append)
    go(one, tmp_path / "runs", say=said.append)
    assert said == [f"{name}: {what}" for what in ("begins", "finished") for name in one.runs]
    path = write_results(one, tmp_path / "runs", tmp_path / "results")
    found = json.loads(path.read_text())
    assert list(found["runs"]) == list(one.runs) and found["study"].keys() == {
        *("name", "title", "model", "make_model", "data", "limit", "order", "dtype", "threads", "preset"),
        *("perplexity_text", "checkpoint_every", "curve_every", "curve_sample", "score_sample", "answers"),
    }
    assert found["study"]["title"] == "tiny" and found["study"]["curve_sample"] == 3
    assert found["study"]["perplexity_text"] == "heldout" and found["study"]["answers"] is False  # not given
    for name, run in found["runs"].items():
        events = run_folder.read_events(tmp_path / "runs" / slug(name))
        (last,) = (e for e in events if e["event"] == "evaluation" and e["when"] == "after")
        assert run["after"]["scores"] == last["scores"] and run["edits"] == 9
        sums = {n: sum(e["energy"] for e in events if e["event"] == "energy" and e["batch"] == n) for n in (0, 2, 4, 5)}
        assert [(c["edits"], c["energy"]) for c in run["curve"]] == [(4, sums[2]), (8, sums[4]), (9, sums[5])]
        assert (run["energy"]["before"], run["energy"]["after"]) == (sums[0], sums[5])
        reached = {e["batch"]: e.get("reached") for e in events if e["event"] == "batch"}
        assert [c.get("reached") for c in run["curve"]] == pytest.approx([reached[n] for n in (2, 4, 5)], abs=1e-4)
        assert (reached[5] is None) == (name == "FT")
        assert run["finished"] and run["settings"]["method"] == ("ft" if name == "FT" else "alphaedit")
    assert "$HERE" in found["study"]["data"] and str(tmp_path) not in path.read_text()
    written = path.with_suffix(".md").read_text().splitlines()
    assert len(written) == 14 + 2 * len(one.runs) and written == tables(found).splitlines()
    accuracy = found["runs"]["AlphaEdit"]["after"]["scores"]["efficacy_accuracy"]["mean"]
    assert f" {100 * accuracy:.1f} ± " in written[3]
    drawn = ET.parse(path.with_suffix(".svg"))
    assert {"AlphaEdit", "AlphaEdit + SPHERE", "FT"} <= {element.text for element in drawn.iter()}


def _ended(method="alphaedit", **settings):
    """A run as `collect` has it when it adds what SPHERE added."""
    return {"finished": True, "settings": EditConfig(targets="optimised", method=method, **settings).to_dict()}


def test_the_base_is_the_same_run_without_sphere():
    found = {
        "other": _ended(sphere=False, ridge=3.0),
        "stopped": _ended(sphere=False) | {"finished": False},
        "base": _ended(sphere=False),
        "same": _ended(alpha=0.9, energy_ratio=0.7, subspace="pretrained", project="solve"),
        "MEMIT": _ended("memit", sphere=False),
        "whole": _ended("memit", sphere=False, project="batch"),
        "MEMIT + SPHERE": _ended("memit", project="batch"),
        "RECT": _ended("rect"),
        "unfinished": _ended() | {"finished": False},
    }
    bases = {name: _without_sphere(found, name) for name in found}
    assert {name: base for name, base in bases.items() if base} == {"same": "base", "MEMIT + SPHERE": "whole"}


def test_what_sphere_added():
    """Request by request, those that both have, in whatever order."""
    own = {"a": {"efficacy_success": 1.0}, "b": {"efficacy_success": 0.5}, "c": {"efficacy_success": 1.0}, "e": {}}
    base = {"b": {"efficacy_success": 1.0}, "a": {"efficacy_success": 0.0}, "d": {"efficacy_success": 1.0}, "e": {}}
    found = _differences(own, base)
    assert set(found) == set(SCORES) and found["efficacy_success"] == {"mean": 0.25, "stderr": 0.75, "n": 2}
    assert found["specificity_success"] == {"mean": None, "stderr": None, "n": 0}
    first = [[{"first": {"efficacy_accuracy": {"mean": m, "stderr": s, "n": 5}}}] for m, s in ((0.5, 0.3), (0.75, 0.4))]
    assert _difference_of_first(*first) == {"first": {"mean": -0.25, "stderr": 0.5, "n": 5}}
    assert _difference_of_first(first[0], []) == {}


def test_what_sphere_added_is_in_the_results(write, tmp_path):
    one = Study.read(write(runs={"AlphaEdit": {"sphere": False}, "more": {"alpha": 0.9}}))
    go(one, tmp_path / "runs", say=lambda text: None)
    found = collect(one, tmp_path / "runs")["runs"]
    less, ends = found["more"]["less_base"], [found[name]["after"]["scores"] for name in ("more", "AlphaEdit")]
    apart = {s: ends[0][s]["mean"] - ends[1][s]["mean"] for s in SCORES}
    assert less["base"] == "AlphaEdit" and "less_base" not in found["AlphaEdit"] and any(apart.values())
    assert {score: less[score]["mean"] for score in SCORES} == pytest.approx(apart)


def test_settings_of_all_runs_spare_methods_without_a_use_for_them(write):
    one = Study.read(write())
    assert one.config("FT").layers == (1, 2) and one.config("FT").ridge == 10.0
    assert one.config("AlphaEdit").ridge == 0.1 and not one.config("AlphaEdit").sphere


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_stopped_study_goes_on(batch, write, tmp_path):
    one = Study.read(write(runs={"AlphaEdit": {}}))
    go(one, tmp_path / "whole", say=lambda text: None)

    def stop(what, done, total):
        if what == "batches" and done == batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(one, tmp_path / "torn", say=lambda text: None, on_progress=stop)
    said: list[str] = []
    go(one, tmp_path / "torn", say=said.append)
    assert said == ["AlphaEdit: going on"]
    whole, torn = (_plain(collect(one, tmp_path / name)) for name in ("whole", "torn"))
    assert whole == torn and len(whole["AlphaEdit"]["curve"]) == 3


def test_what_another_process_is_at_work_on_is_passed_over(write, tmp_path):
    one = Study.read(write())
    (tmp_path / "runs" / "alphaedit").mkdir(parents=True)
    said: list[str] = []
    with locked(tmp_path / "runs" / "alphaedit"):
        go(one, tmp_path / "runs", only=["AlphaEdit", "FT"], say=said.append)
    assert "AlphaEdit: passed over" in said[0] and "in use by process" in said[0]
    assert list(collect(one, tmp_path / "runs")["runs"]) == ["FT"]


def test_the_model_is_made_where_it_is_missing(write, tmp_path, monkeypatch):
    code = "import pathlib, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])\n"
    (tmp_path / "making_a_model.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    make = ["making_a_model", "$HERE/model", "$HERE/made"]
    one = Study.read(write(model="$HERE/made", make_model=make, runs={"AlphaEdit": {}}))
    with pytest.raises(ConfigError, match="run 'python -m making_a_model .*made', or if you trust it"):
        go(one, tmp_path / "runs", say=lambda text: None)
    assert not (tmp_path / "made").exists()
    go(one, tmp_path / "runs", trusted=True, say=lambda text: None)
    assert (tmp_path / "made" / "config.json").exists() and finished(tmp_path / "runs" / "alphaedit")


def test_a_model_that_could_not_be_made(write, tmp_path):
    one = Study.read(write(model="$HERE/made", make_model=["no_such_module"], runs={"AlphaEdit": {}}))
    with pytest.raises(ConfigError, match="'python -m no_such_module' ended with status 1 and made no model"):
        go(one, tmp_path / "runs", trusted=True, say=lambda text: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": None}, "field 'runs' is missing"),
        ({"runs": {}}, "runs: expected names with values, got {}"),
        ({"runs": ["AlphaEdit"]}, "runs: expected names with values"),
        ({"runs": {1: {}}}, "a run's name must have letters or digits from a to z, got 1"),
        ({"runs": {"Альфа": {}}}, "a run's name must have letters"),
        ({"runs": {"A": 3}}, "run 'A' must be settings, got 3"),
        ({"runs": {"A": {"alpha": 2}}}, "run 'A': alpha: expected a number from 0 to 1, got 2"),
        ({"runs": {"A": {"method": "none"}}}, "run 'A': method: expected one of"),
        ({"runs": {"A b": {}, "a B": {}}}, "the same folder name"),
        ({"colour": "red"}, "unknown field 'colour'; known fields are title"),
        ({"threads": "two"}, "threads: expected a whole number of at least 1, got 'two'"),
        ({"threads": True}, "threads: expected a whole number of at least 1, got True"),
        ({"curve_every": -1}, "curve_every: expected a whole number of at least 0"),
        ({"score_sample": 0}, "score_sample: expected a whole number of at least 1"),
        ({"data": ["a"]}, "data: expected a text"),
        ({"make_model": [1]}, "make_model: expected a list of texts"),
        ({"settings": [1]}, "settings: expected names with values"),
        ({"runs": {"A": {"method": "os:abort"}}}, "run 'A': method: os:abort is code that a file names"),
        ({"preset": "none"}, "preset 'none' is not known"),
    ],
)
def test_bad_files(given, message, write):
    with pytest.raises(ConfigError, match=message):
        Study.read(write(**given))


def test_unknown_run(write, tmp_path):
    with pytest.raises(ConfigError, match="run 'B' is not in the study; expected of AlphaEdit, "):
        go(Study.read(write()), tmp_path / "runs", only=["B"])
    assert not (tmp_path / "runs").exists()


def _curves(run) -> list[Event]:
    return [event for event in run_folder.read_events(run) if event["event"] == "curve"]


def test_curves_are_of_the_model_on_the_way(write, tmp_path, facts, tokenizer):
    """Those after every other batch and the last, against evaluating a model that got these edits only."""
    one = Study.read(write(runs={"AlphaEdit": {}}, curve_sample=100))
    go(one, tmp_path / "runs", say=lambda text: None)
    seen = _curves(tmp_path / "runs" / "alphaedit")
    assert [event["edits"] for event in seen] == [4, 8, 9]
    for event in seen:
        model, done = tiny.make_model("llama"), facts[: event["edits"]]
        options = experiment.RunOptions("tiny", "facts", tmp_path / f"to {event['edits']}", perplexity_tokens=100)
        experiment.run(model, tokenizer, done, one.config("AlphaEdit"), options)
        assert event["scores"] == event["first"] == evaluate(model, tokenizer, done).to_dict()
        newest = evaluate(model, tokenizer, done[-1 if len(done) == 9 else -2 :]).to_dict()
        assert {name: event["last"][name] for name in newest} == newest
        assert not any(event["last"][name]["n"] for name in set(event["last"]) - set(newest))
        assert set(SCORES) <= set(event["scores"]) and event["perplexity"] > 1


def test_samples_are_no_larger_than_asked(write, tmp_path):
    one = Study.read(write(runs={"AlphaEdit": {}}, score_sample=4))
    go(one, tmp_path / "runs", say=lambda text: None)
    events = run_folder.read_events(tmp_path / "runs" / "alphaedit")
    ends = [e["scores"]["efficacy_accuracy"]["n"] for e in events if e["event"] == "evaluation"]
    scored = [e["id"] for e in events if e["event"] == "request"]
    assert ends == [4, 4] and len(scored) == 4 and len(set(scored)) == 4
    seen = _curves(tmp_path / "runs" / "alphaedit")
    counts = [[event[group]["efficacy_accuracy"]["n"] for group in ("scores", "first", "last")] for event in seen]
    assert counts == [[3, 3, 2], [3, 3, 2], [3, 3, 1]]


def test_answers_are_scored_shown_and_compared(write, tmp_path):
    settings = {"AlphaEdit": {"sphere": False}, "AlphaEdit + SPHERE": {}}
    one = Study.read(write(runs=settings, score_sample=4, answers=True))
    go(one, tmp_path / "runs", say=lambda text: None)
    folder = tmp_path / "runs" / "alphaedit"
    (found,) = [
        e["scores"] for e in run_folder.read_events(folder) if e["event"] == "evaluation" and e["when"] == "after"
    ]
    assert found["efficacy_contains"]["n"] == 4
    assert "generalization contains" in write_report(folder).read_text()
    text = tables(collect(one, tmp_path / "runs"))
    assert text.count("| generalization contains |") == 2  # of the runs, and of what SPHERE added
    with pytest.raises(RunError, match="answers is True there, False here"):
        go(_change(tmp_path / "small.yaml", answers=False), tmp_path / "runs")


def test_answers_and_what_follows_are_in_the_curves_where_they_are(write, tmp_path, facts, monkeypatch):
    path = write(runs={"AlphaEdit": {}}, curve_answers=2, score_sample=4)
    follows = {"portability": ["It is"], "portability_answers": ["a"], "multi_hop": ["Who?", "It is"]}
    follows |= {"multi_hop_answers": ["a", "the"], "multi_hop_true": "old"}
    run_folder.write_jsonl(tmp_path / "facts.jsonl", [fact.to_dict() | follows for fact in facts])
    asked = []
    monkeypatch.setattr(snapshots, "evaluate_answers", lambda *a: asked.append(a[2]) or evaluate_answers(*a))
    go(Study.read(path), tmp_path / "runs", say=lambda text: None)
    folder = tmp_path / "runs" / "alphaedit"
    seen = [e for e in run_folder.read_events(folder) if e["event"] == "curve"]
    scored = {name: 2 for name in (*ANSWER_SCORES, *FOLLOWING_ANSWER_SCORES) if "efficacy" in name or "_hop" in name}
    for event, batch in zip(seen, (2, 2, 1), strict=True):
        for group, n in (("scores", 2), ("first", 2), ("last", batch)):
            found = {name: event[group][name]["n"] for name in scored}
            assert found == dict.fromkeys(scored, n)
            assert event[group]["multi_hop_accuracy"]["n"] == event[group]["portability_token_accuracy"]["n"]
    assert [len(requests) == len({r.id for r in requests}) <= 6 for requests in asked] == [True] * 3
    page = write_report(folder).read_text()
    for text in ("portability accuracy", "multi hop success", "efficacy token accuracy", "Answers over edits"):
        assert text in page
    found = collect(Study.read(path), tmp_path / "runs")
    assert found["study"]["curve_answers"] == 2
    head = tables(found).splitlines()[0]
    assert "| multi hop success | multi hop accuracy |" in head and "portability accuracy" in head
    assert "portability success" not in head and "token" not in head  # neither is there, or beside success
    drawn = plots(found)
    assert all(f">{title}<" in drawn for title in _FURTHER_PANELS)
    bare = json.loads(json.dumps(found))
    for event in bare["runs"]["AlphaEdit"]["curve"]:
        del event["reached"]
        for group in ("scores", "first", "last"):
            event[group] = {name: score for name, score in event[group].items() if name in SCORES}
    assert not any(f">{title}<" in plots(bare) for title in _FURTHER_PANELS)


def test_answers_on_the_way_need_a_way(write, tmp_path):
    one = Study.read(write(runs={"AlphaEdit": {}}, curve_answers=2, curve_every=0))
    with pytest.raises(ValueError, match="curve_answers 2: expected curve_every with it, got 0"):
        go(one, tmp_path / "runs", say=lambda text: None)
    assert not (tmp_path / "runs" / "alphaedit").exists()


def _change(path, **fields):
    written = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(written | fields))
    return Study.read(path)


def test_a_run_from_before_a_setting_was_there_is_the_study_s(write, tmp_path):
    """It had the default; so had its base."""
    one = Study.read(write(runs={"AlphaEdit": {"sphere": False}, "AlphaEdit + SPHERE": {}}))
    go(one, tmp_path / "runs", say=lambda text: None)
    whole = collect(one, tmp_path / "runs")["runs"]["AlphaEdit + SPHERE"]["less_base"]
    config = tmp_path / "runs" / "alphaedit" / run_folder.CONFIG
    record = yaml.safe_load(config.read_text())
    for name in ("directions", "revive"):
        del record["settings"][name]
    config.write_text(yaml.safe_dump(record))
    assert collect(one, tmp_path / "runs")["runs"]["AlphaEdit + SPHERE"]["less_base"] == whole


def test_runs_of_another_study_are_refused(write, tmp_path):
    """What was made with other settings or data is neither gone on with nor shown as this study's."""
    path = write(runs={"AlphaEdit": {}})
    go(Study.read(path), tmp_path / "runs", say=lambda text: None)
    before = (tmp_path / "runs" / "alphaedit" / run_folder.METRICS).read_bytes()
    for fields, message in (
        ({"settings": _SETTINGS | {"alpha": 0.9}}, "alpha is 0.5 there, 0.9 here"),
        ({"settings": _SETTINGS, "limit": 2}, "limit is None there, 2 here"),
        ({"limit": None, "curve_sample": 5}, "curve_sample is 3 there, 5 here"),
    ):
        other = _change(path, **fields)
        for use in (lambda: go(other, tmp_path / "runs"), lambda: collect(other, tmp_path / "runs")):  # noqa: B023
            with pytest.raises(RunError, match=f"is not run 'AlphaEdit' of this study: {message}"):
                use()
    assert (tmp_path / "runs" / "alphaedit" / run_folder.METRICS).read_bytes() == before


def test_what_diverges_stops_alone(write, tmp_path):
    """The others are made, and the results say where it stopped."""
    wild = {"method": "ft", "ft_steps": 2, "ft_lr": 1e30}
    one = Study.read(write(runs={"FT": wild, "AlphaEdit": {}}, curve_every=1))
    said: list[str] = []
    go(one, tmp_path / "runs", say=said.append)
    assert [line.partition(",")[0] for line in said] == ["FT: begins", "FT: stopped", "AlphaEdit: begins"]
    found = collect(one, tmp_path / "runs")["runs"]
    assert list(found) == ["AlphaEdit"]  # the first batch did it: there is nothing to show


def test_an_unfinished_run_is_shown_as_far_as_it_went(write, tmp_path):
    one = Study.read(write(runs={"AlphaEdit": {}}))

    def stop(what, done, total):
        if what == "batches" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(one, tmp_path / "runs", say=lambda text: None, on_progress=stop)
    found = collect(one, tmp_path / "runs")
    run = found["runs"]["AlphaEdit"]
    assert (run["finished"], run["edits"], run["after"], len(run["curve"])) == (False, 6, None, 1)
    assert "AlphaEdit (stopped after 6 edits)" in tables(found) and plots(found).startswith("<?xml")


def test_killed_while_its_last_files_are_written(write, tmp_path, monkeypatch):
    one = Study.read(write(runs={"AlphaEdit": {}}))
    folder = tmp_path / "runs" / "alphaedit"

    def fail(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "write_report", fail)
        go(one, tmp_path / "runs", say=lambda text: None)
    with (folder / run_folder.METRICS).open("a") as log:
        log.write('{"event": "spec')  # and its log is torn
    assert not finished(folder)
    go(one, tmp_path / "runs", say=lambda text: None)
    assert finished(folder) and (folder / "report.html").exists()
    assert run_folder.read_events(folder)[-1]["event"] == "finished"


def test_a_part_does_not_replace_the_whole(write, tmp_path):
    path = write()
    go(Study.read(path), tmp_path / "runs", say=lambda text: None)
    whole = write_results(Study.read(path), tmp_path / "runs", tmp_path / "results")
    before = whole.read_bytes()
    go(Study.read(path), tmp_path / "others", only=["FT"], say=lambda text: None)
    part = write_results(Study.read(path), tmp_path / "others", tmp_path / "results")
    assert part.parent == tmp_path / "others" and whole.read_bytes() == before
    with pytest.raises(RunError, match="has no evaluated run of small"):
        write_results(Study.read(path), tmp_path / "nowhere", tmp_path / "results")


def test_names_of_runs_are_only_text(write, tmp_path):
    names = {"a $\\frac$ | b": {}, "_c": {"alpha": 0.1}}
    one = Study.read(write(runs=names))
    go(one, tmp_path / "runs", say=lambda text: None)
    found = collect(one, tmp_path / "runs")
    shown = {element.text for element in ET.fromstring(plots(found)).iter()}
    assert set(names) <= shown
    rows = [line.replace("\\|", "") for line in tables(found).splitlines()]
    assert {row.count("|") for row in rows} == {0, 14, 8}
    assert tables(found).count(" | – | ") == 2  # nothing collapsed
    for event in found["runs"]["_c"]["curve"]:  # a collapse is drawn on scales of their own
        event["perplexity"], event["energy"] = 10.0 ** event["edits"], event["energy"] * event["edits"]
    assert "| 4 (+3e+02 %) |" in tables(found)  # seen at the first look
    labels = {element.text for element in ET.fromstring(plots(found)).iter()}
    assert "1e+08" in labels and not any(label and "mathdefault" in label for label in labels)
