"""What the runs of a study found: one JSON file, tables and plots."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sphere_edit import runs
from sphere_edit.files import replacing
from sphere_edit.journal import RunError
from sphere_edit.measures import correlations
from sphere_edit.metrics import SCORES
from sphere_edit.records import Event
from sphere_edit.study import Study, as_written, finished, slug

_GROUPS = ("scores", "first", "last")
_PANELS = {  # title: where in a curve's event
    "Efficacy, accuracy, %": ("scores", "efficacy_accuracy"),
    "Generalization, accuracy, %": ("scores", "generalization_accuracy"),
    "Specificity, accuracy, %": ("scores", "specificity_accuracy"),
    "Efficacy, success, %": ("scores", "efficacy_success"),
    "The first edits, accuracy, %": ("first", "efficacy_accuracy"),
    "The newest edits, accuracy, %": ("last", "efficacy_accuracy"),
    "Specificity, success, %": ("scores", "specificity_success"),
    "Perplexity": ("perplexity", ""),
    "HE, change in %": ("energy", ""),
}
_STYLE: dict[str, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "sphere-edit", "text.parse_math": False, "font.size": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e5"},
}


def write_results(study: Study, folder: Path, results: Path) -> Path:
    """Collect the runs into ``<study>.json``, ``.md`` (tables) and ``.svg`` (plots) in ``results``; where runs have not
    begun, in ``folder``, so that a part never replaces the whole. Returns the JSON's path.

    Raises:
        RunError: no run has been evaluated on its way or at its end, or one is not the study's.
    """
    found = collect(study, folder)
    if not found["runs"]:
        raise RunError(f"{folder} has no evaluated run of {study.name}")
    place = results if len(found["runs"]) == len(study.runs) else folder
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{study.name}.json"
    for target, text in (
        (path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        (path.with_suffix(".md"), tables(found)),
        (path.with_suffix(".svg"), plots(found)),
    ):
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def collect(study: Study, folder: Path) -> dict[str, Any]:
    """What the runs of a study found.

    Returns:
        ``study`` as written, and ``runs``: for each that has been evaluated ``finished``, ``edits`` done, ``settings``,
        ``environment``, ``seconds`` by stage, ``before`` and ``after`` (scores and perplexity; ``after`` None where it
        is not finished), ``curve`` (scores on the way, each with ``energy``, HE summed over the layers), ``energy``
        (that sum at both ends), ``layers`` (first and last energy event of each) and ``correlations``.
    """
    found = {}
    for name in study.runs:
        path = folder / slug(name)
        if not (path / runs.METRICS).exists():
            continue
        study.check_own(name, path)
        complete = finished(path)
        events, record = runs.read_events(path), runs.read_config(path)
        if complete or any(e["event"] == "curve" for e in events):
            settings = as_written(study, record["settings"], name)
            found[name] = {"finished": complete, **_summary(events), "settings": settings}
            found[name]["environment"] = record["environment"]
    shown = {f.name: getattr(study, f.name) for f in fields(study) if f.name not in ("runs", "settings")}
    return {"study": shown, "runs": found}


def _summary(events: Sequence[Event]) -> dict[str, Any]:
    energies: dict[int, dict[int, Event]] = {}
    for event in events:
        if event["event"] == "energy":
            energies.setdefault(event["batch"], {})[event["layer"]] = event
    sums = {batch: math.fsum(e["energy"] for e in layers.values()) for batch, layers in energies.items()}
    looks = [e for e in events if e["event"] == "evaluation"]
    ends = {e["when"]: {"scores": e["scores"], "perplexity": e["perplexity"]} for e in looks}
    batches = [e for e in events if e["event"] == "batch"]
    stages = dict.fromkeys(stage for batch in batches for stage in batch["seconds"])
    seconds = {stage: math.fsum(batch["seconds"].get(stage, 0.0) for batch in batches) for stage in stages}
    seconds["all"] = next((e["seconds"] for e in events if e["event"] == "finished"), math.fsum(seconds.values()))
    last = max(energies)
    return {
        "edits": batches[-1]["edits"] if batches else 0,
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "before": ends.get("before"),
        "after": ends.get("after"),
        "energy": {"before": sums[0], "after": sums[last]},
        "layers": {str(layer): [energies[0][layer], energies[last][layer]] for layer in energies[0]},
        "curve": [_thin(e, sums[e["batch"]]) for e in events if e["event"] == "curve"],
        "correlations": correlations(events),
    }


def _thin(event: Event, energy: float) -> dict[str, Any]:
    """A curve's event with four digits of each score."""
    scores = {
        group: {
            name: {key: value if value is None else round(value, 4) for key, value in score.items()}
            for name, score in event[group].items()
            if score["n"]
        }
        for group in _GROUPS
    }
    return {"edits": event["edits"], **scores, "perplexity": event["perplexity"], "energy": energy}


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: the end of each run (shares in per cent, HE as its change), then Spearman's correlations."""
    head = ["", *(name.replace("_", " ") for name in SCORES), "first", "newest", "perplexity", "HE", "minutes"]
    first = next(iter(found["runs"].values()))["before"]
    rows = [["before", *_shares(first["scores"]), "", "", _short(first["perplexity"]), "", ""]]
    related = []
    for name, run in found["runs"].items():
        curve = run["curve"][-1] if run["curve"] else {"first": {}, "last": {}}
        end = run["after"] or curve
        change = 100 * (run["energy"]["after"] / run["energy"]["before"] - 1)
        label = name.replace("|", "\\|") + ("" if run["finished"] else f" (stopped after {run['edits']} edits)")
        rows.append(
            [
                label,
                *_shares(end["scores"]),
                *(_share(curve[group].get("efficacy_accuracy")) for group in ("first", "last")),
                _short(end["perplexity"]),
                f"{change:+.2g} %",
                f"{run['seconds']['all'] / 60:.0f}",
            ]
        )
        seen = {r["score"]: r for r in run["correlations"] if r["energy"] == "change"}
        if any(r["rho"] is not None for r in seen.values()):
            related.append([label, *(_correlation(seen.get(name)) for name in SCORES)])
    text = _table(head, rows)
    if related:
        text += "\nSpearman's ρ of |ΔHE| with each score over the curve (p, n):\n\n"
        text += _table(head[: len(SCORES) + 1], related)
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _shares(scores: Mapping[str, Any]) -> Iterator[str]:
    for name in SCORES:
        yield _share(scores.get(name))


def _share(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return "–"
    return f"{100 * score['mean']:.1f}" + ("" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}")


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _correlation(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None or row["rho"] is None else f"{row['rho']:+.2f} ({row['p']:.1g}, {row['n']})"


def plots(found: Mapping[str, Any]) -> str:
    """One SVG: a panel per measure over the edits, a line per run; a base method and its SPHERE share a colour."""
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure

    names = list(found["runs"])
    bases = list(dict.fromkeys(map(_base, names)))
    colours = colormaps["tab10" if len(bases) <= 10 else "tab20"]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(11, 9.5), layout="constrained")
        lines = {}
        for axes, (title, (group, score)) in zip(figure.subplots(3, 3).flat, _PANELS.items(), strict=True):
            for name in names:
                points = _points(found["runs"][name], group, score)
                if points:
                    dashes = "--" if f"{name} + SPHERE" in names else "-"
                    colour = colours(bases.index(_base(name)) % colours.N)
                    lines[name] = axes.plot(*zip(*points, strict=True), color=colour, ls=dashes, lw=1.2)[0]
            axes.set_title(title, fontsize=9)
            axes.set_xlim(0, None)
            if group == "perplexity":
                axes.set_yscale("log")
            elif group == "energy":
                axes.set_yscale("symlog", linthresh=1.0)
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4)
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
            value = (event[group].get(score) or {}).get("mean")
            value = None if value is None else 100 * value
        if value is not None:
            points.append((event["edits"], value))
    return points
