"""Studies: runs of one model and data that differ in their settings, and the tables and plots that compare them.

A study is a YAML file:

    title: what it asks
    model: a name or path, as for ``sphere-edit run``
    make_model: [python module, argument, …]   # optional: run as ``python -m`` where the model's folder is missing
    data: as for ``sphere-edit run``, and limit, order, dtype, threads, preset, perplexity_text
    curve_every, curve_sample, score_sample, checkpoint_every: as there
    settings: {…}           # of all runs
    runs:                   # name: settings of its own
      AlphaEdit: {method: alphaedit, sphere: false}
      AlphaEdit + SPHERE: {method: alphaedit}

Relative paths in it are from where the command is called, ``$NAME`` in them is a variable of the environment.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sphere_edit import runs
from sphere_edit.config import ConfigError, EditConfig, foreign, preset
from sphere_edit.files import replacing
from sphere_edit.journal import BATCHES, CHECKPOINTS, RunError
from sphere_edit.measures import correlations
from sphere_edit.methods import method_class
from sphere_edit.metrics import SCORES

_PANELS = {  # title: (of a curve's event, or of its energies)
    "Efficacy, accuracy, %": ("scores", "efficacy_accuracy"),
    "Generalization, accuracy, %": ("scores", "generalization_accuracy"),
    "Specificity, accuracy, %": ("scores", "specificity_accuracy"),
    "Efficacy, success, %": ("scores", "efficacy_success"),
    "The first edits, accuracy, %": ("first", "efficacy_accuracy"),
    "The newest edits, accuracy, %": ("last", "efficacy_accuracy"),
    "Specificity, success, %": ("scores", "specificity_success"),
    "Perplexity": ("perplexity", ""),
    "HE, change in % of the first": ("energy", ""),
}


@dataclass(frozen=True)
class Study:
    """See the module's text; ``name`` is that of the file."""

    name: str
    title: str
    model: str
    data: str
    runs: dict[str, dict[str, Any]]
    make_model: list[str] = field(default_factory=list)
    limit: int | None = None
    order: str | None = None
    dtype: str = "auto"
    threads: int = 1
    preset: str = "auto"
    perplexity_text: str = "heldout"
    curve_every: int = 0
    curve_sample: int = 200
    score_sample: int | None = None
    checkpoint_every: int = 10
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read and check a study's file.

        Raises:
            ConfigError: a field is unknown, missing or of the wrong kind, or a run has a setting that cannot be.
        """
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML ({error})") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected the fields of a study, found {type(found).__name__}")
        known = {f.name: f for f in fields(cls) if f.name != "name"}
        for name in found:
            if name not in known:
                raise ConfigError(f"{path}: unknown field {name!r}; known fields are {', '.join(known)}")
        for name in ("title", "model", "data", "runs"):
            if name not in found:
                raise ConfigError(f"{path}: field {name!r} is missing")
        kinds = {"runs": dict, "settings": dict, "make_model": list, "threads": int, "curve_every": int}
        for name, value in found.items():
            if not isinstance(value, kinds.get(name, object)):
                raise ConfigError(f"{path}: {name} must be a {kinds[name].__name__}, got {value!r}")
            found[name] = _expanded(value)
        study = cls(path.stem, **found)
        if not study.runs:
            raise ConfigError(f"{path}: runs is empty; expected at least one")
        for name in study.runs:
            if not isinstance(study.runs[name], dict):
                raise ConfigError(f"{path}: run {name!r} must be settings, got {study.runs[name]!r}")
            try:
                study.config(name)
            except ConfigError as error:
                raise ConfigError(f"{path}: run {name!r}: {error}") from error
        if len({slug(name) for name in study.runs}) < len(study.runs):
            raise ConfigError(f"{path}: two runs have the same folder name; expected names that differ in letters")
        return study

    def config(self, run: str) -> EditConfig:
        """The settings of a run: the preset of its method, the study's that this method has a use for, its own."""
        method = str(self.runs[run].get("method", self.settings.get("method", "alphaedit")))
        shared = {name: value for name, value in self.settings.items() if name not in foreign(method)}
        own = {name: _expanded(value) for name, value in (shared | self.runs[run]).items()}
        config = EditConfig.from_dict(preset(self.preset, method).to_dict() | own)
        method_class(config)  # the method's name is known
        return config


def _expanded(value: Any) -> Any:
    """A text with the variables of the environment in place."""
    return os.path.expandvars(value) if isinstance(value, str) else value


def slug(name: str) -> str:
    """A run's folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "plus")).strip("-")


def go(
    study: Study,
    folder: Path,
    only: Sequence[str] = (),
    keep: bool = False,
    say: Callable[[str], None] = print,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Make the runs of a study in ``folder``, one after another: what is finished stays, what was stopped goes on, and
    what another process is at work on is passed over, so that the command may be given twice at once.

    Args:
        only: runs to make; by default all.
        keep: keep batch files and checkpoints of finished runs, without which they cannot be rolled back.

    Raises:
        ConfigError, ValueError, RunError: as `procedure.run`, before anything is made where that can be seen.
    """
    unknown = [name for name in only if name not in study.runs]
    if unknown:
        raise ConfigError(f"run {unknown[0]!r} is not in the study; expected of {', '.join(study.runs)}")
    for name in only or study.runs:
        path = folder / slug(name)
        if finished(path):
            say(f"{name}: finished")
            continue
        try:
            _go_on(study, name, path, say, on_progress)
        except RunError as error:
            if "is in use by" not in str(error):
                raise
            say(f"{name}: passed over, {error}")
            continue
        if not keep:
            for part in (BATCHES, CHECKPOINTS):
                shutil.rmtree(path / part, ignore_errors=True)


def finished(path: Path) -> bool:
    """Whether a run's metrics are complete."""
    return (path / runs.METRICS).exists() and any(e["event"] == "finished" for e in runs.read_events(path))


def _go_on(
    study: Study,
    name: str,
    path: Path,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None] | None,
) -> None:
    from sphere_edit.data import load_requests
    from sphere_edit.options import load
    from sphere_edit.procedure import RunOptions, resume, run

    if (path / runs.JOURNAL).exists():
        say(f"{name}: going on")
        loaded = load(study.model, study.dtype, "cpu", study.threads, False)
        resume(*loaded, path, on_progress=on_progress)
        return
    say(f"{name}: begins")
    requests = load_requests(study.data, limit=study.limit, order=study.order)
    make_model(study, say)
    options = RunOptions(
        study.model,
        study.data,
        path,
        perplexity_text=study.perplexity_text,
        checkpoint_every=study.checkpoint_every,
        curve_every=study.curve_every,
        curve_sample=study.curve_sample,
        score_sample=study.score_sample,
        given={"limit": study.limit, "order": study.order, "preset": study.preset, "dtype": study.dtype},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    loaded = load(study.model, study.dtype, "cpu", study.threads, False)
    run(*loaded, requests, study.config(name), options, on_progress=on_progress)


def make_model(study: Study, say: Callable[[str], None]) -> None:
    """Run ``make_model`` where the model's folder is missing."""
    if study.make_model and not Path(study.model).exists():
        module, *arguments = (os.path.expandvars(str(part)) for part in study.make_model)
        say(f"making {study.model}: python -m {module} {' '.join(arguments)}")
        subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def collect(study: Study, folder: Path) -> dict[str, Any]:
    """What the finished runs of a study found, for one JSON file.

    Returns:
        The study, the environment, and per run: ``settings``, ``seconds`` by stage, ``before`` and ``after`` (scores
        and perplexity), ``curve`` (events of the way, each with ``energy``: HE summed over the layers), ``layers``
        (energy events of first and last batch), ``correlations``.
    """
    found = {}
    environment: dict[str, Any] = {}
    for name in study.runs:
        path = folder / slug(name)
        if not finished(path):
            continue
        events, record = runs.read_events(path), runs.read_config(path)
        environment = record["environment"]
        found[name] = _summary(events) | {"settings": record["settings"], "edits": record["edits"]}
    shown = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in ("runs", "settings")}
    return {"study": shown, "environment": environment, "runs": found}


def _summary(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    energies: dict[int, dict[int, Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] == "energy":
            energies.setdefault(event["batch"], {})[event["layer"]] = event
    sums = {batch: math.fsum(e["energy"] for e in layers.values()) for batch, layers in energies.items()}
    ends = {e["when"]: e for e in events if e["event"] == "evaluation"}
    curve = [{**e, "energy": sums[e["batch"]]} for e in events if e["event"] == "curve"]
    seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "batch":
            for stage, spent in event["seconds"].items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
    seconds["all"] = next(e["seconds"] for e in events if e["event"] == "finished")
    return {
        **{when: {"scores": e["scores"], "perplexity": e["perplexity"]} for when, e in ends.items()},
        "energy": {"before": sums[0], "after": sums[max(sums)]},
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "curve": [_thin(event) for event in curve],
        "layers": {str(layer): [energies[0][layer], energies[max(energies)][layer]] for layer in energies[0]},
        "correlations": correlations(events),
    }


def _thin(event: Mapping[str, Any]) -> dict[str, Any]:
    """A curve's event with four digits of each mean."""
    means = {
        group: {name: None if s["mean"] is None else round(s["mean"], 4) for name, s in event[group].items()}
        for group in ("scores", "first", "last")
    }
    return {"edits": event["edits"], **means, "perplexity": event["perplexity"], "energy": event["energy"]}


def write_results(study: Study, folder: Path, results: Path) -> Path:
    """Collect into ``results/<study>.json``, ``.md`` (tables) and ``.svg`` (plots); the JSON's path."""
    found = collect(study, folder)
    if not found["runs"]:
        raise RunError(f"{folder} has no finished run of {study.name}")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{study.name}.json"
    for place, text in (
        (path, json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
        (path.with_suffix(".md"), tables(found)),
        (path.with_suffix(".svg"), plots(found)),
    ):
        with replacing(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: one line per run, means in per cent."""
    head = ["", *(name.replace("_", " ") for name in SCORES), "first", "newest", "perplexity", "HE", "minutes"]
    first = next(iter(found["runs"].values()))
    rows = [["before", *_shares(first["before"]["scores"]), "", "", _short(first["before"]["perplexity"]), "", ""]]
    for name, run in found["runs"].items():
        ends = run["curve"][-1] if run["curve"] else {"first": {}, "last": {}}
        change = 100 * (run["energy"]["after"] / run["energy"]["before"] - 1)
        rows.append(
            [
                name,
                *_shares(run["after"]["scores"]),
                *(_share(ends[group].get("efficacy_accuracy")) for group in ("first", "last")),
                _short(run["after"]["perplexity"]),
                f"{change:+.2g} %",
                f"{run['seconds']['all'] / 60:.0f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
    return "\n".join(lines) + "\n"


def _shares(scores: Mapping[str, Any]) -> Iterator[str]:
    for name in SCORES:
        score = scores[name]
        error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
        yield _share(score["mean"]) + error


def _share(mean: float | None) -> str:
    return "–" if mean is None else f"{100 * mean:.1f}"


def _short(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


def plots(found: Mapping[str, Any]) -> str:
    """One SVG: a panel per measure over the edits, a line per run; a base method and its SPHERE share a colour."""
    from matplotlib import style
    from matplotlib.figure import Figure

    names = list(found["runs"])
    bases = list(dict.fromkeys(_base(name) for name in names))
    look: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "sphere-edit", "font.size": 9}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e5"}
    with style.context(["default", look]):
        figure = Figure(figsize=(11, 9), layout="constrained")
        for axes, (title, (group, score)) in zip(figure.subplots(3, 3).flat, _PANELS.items(), strict=True):
            for name in names:
                points = _points(found["runs"][name], group, score)
                colour = f"C{bases.index(_base(name)) % 10}"
                style_ = "-" if name != _base(name) or len(bases) == len(names) else "--"
                axes.plot(*zip(*points, strict=True), color=colour, ls=style_, lw=1.2, label=name) if points else None
            axes.set_title(title, fontsize=9)
            axes.set_xlim(0, None)
            if group == "perplexity":
                axes.set_yscale("log")
            elif group == "energy":
                axes.set_yscale("symlog", linthresh=1.0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _base(run: str) -> str:
    return run.removesuffix(" + SPHERE")


def _points(run: Mapping[str, Any], group: str, score: str) -> list[tuple[int, float]]:
    points = []
    for event in run["curve"]:
        if group == "energy":
            value = 100 * (event["energy"] / run["energy"]["before"] - 1)
        elif group == "perplexity":
            value = event["perplexity"]
        else:
            value = None if event[group].get(score) is None else 100 * event[group][score]
        if value is not None:
            points.append((event["edits"], value))
    return points
