"""The results of a study's runs: one JSON file, tables and plots."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphere_edit.config import as_recorded, defaults
from sphere_edit.evaluation.answers import ANSWER_SCORES, FOLLOWING_ANSWER_SCORES
from sphere_edit.evaluation.metrics import FOLLOWING_SCORES, FURTHER_SCORES, SCORES, TOKEN_SCORES, Score
from sphere_edit.events import Event
from sphere_edit.experiments.study import Study, finished, slug
from sphere_edit.files import replacing
from sphere_edit.report.correlations import correlations, energies_by_batch
from sphere_edit.report.event_log import Log, mean_of
from sphere_edit.runs import run_folder
from sphere_edit.runs.journal import RunError

_GROUPS = ("scores", "first", "last")
_ANSWERS = (*ANSWER_SCORES, *FOLLOWING_ANSWER_SCORES)
_SPHERE = ("sphere", "energy_ratio", "alpha", "subspace", "refresh_every", "directions")
_PANELS = {  # title: place in a curve's event
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
_FURTHER_PANELS = {  # only if some run has the figure
    "Of the batch's wanted change in the weights, %": ("reached", ""),
    "Portability, accuracy, %": ("scores", "portability_accuracy"),
    "Multi-hop, accuracy, %": ("scores", "multi_hop_accuracy"),
    "Answers to edits, contains, %": ("scores", "efficacy_contains"),
    "Answers to the first edits, contains, %": ("first", "efficacy_contains"),
}
_WEIGHTS = {  # column: field of a layer's energy event
    "mean distance moved": "moved_mean",
    "spectral norm": "spectral_norm",
    "condition": "condition",
    "principal directions": "rank",
}
_SCALES: dict[str, dict[str, Any]] = {"perplexity": {"value": "log"}, "energy": {"value": "symlog", "linthresh": 1.0}}
_WIDE = 20.0  # values beyond this that span over a decade get the scale of `_SCALES`
_STYLE: dict[str, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "sphere-edit", "text.parse_math": False, "font.size": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e5"},
}


def write_results(study: Study, folder: Path, results: Path) -> Path:
    """Collect the runs into ``<study>.json``, ``.md`` (tables) and ``.svg`` (plots) in ``results``.

    If some runs have not begun, the files go to ``folder`` instead, so that partial results never replace complete
    ones. Returns the JSON's path.

    Raises:
        RunError: no run has an evaluation yet, or a run is not the study's.
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
    """Collect the figures of a study's runs.

    Returns:
        ``study`` as written, and ``runs``. For each run with an evaluation: ``finished``, ``edits`` done, ``settings``,
        ``environment``, ``seconds`` by stage, ``before`` and ``after`` (scores and perplexity; ``after`` is None for an
        unfinished run), ``curve`` (scores during the run, each with ``energy``, HE summed over the layers, and if known
        ``reached``, the share of its batch's wanted change in the weights), ``energy`` (HE summed over the layers at
        both ends), ``layers`` (first and last energy event of each layer), ``batches`` (over batches and layers: the
        mean share of an update that SPHERE ``suppressed``, and the least ``over_bound``: ‖ΔŴ‖² over the theorem's
        bound) and ``correlations``. If the same run without SPHERE exists and both are finished, also ``less_base``:
        the other run's name as ``base``, and by score the gain with SPHERE (mean of the differences of each request's
        scores, with standard error); ``first`` is retention.
    """
    found, ends = {}, {}
    for name in study.runs:
        path = folder / slug(name)
        if not (path / run_folder.METRICS).exists():
            continue
        study.check_own(name, path)
        complete = finished(path)
        events, record = run_folder.read_events(path), run_folder.read_config(path)
        if complete or any(e["event"] == "curve" for e in events):
            settings = _as_written(study, record["settings"], name)
            found[name] = {"finished": complete, **_summary(events), "settings": settings}
            found[name]["environment"] = record["environment"]
            ends[name] = {e["id"]: e["after"] for e in events if e["event"] == "request"} if complete else {}
    for name, run in found.items():
        base = _without_sphere(found, name)
        if base:
            run["less_base"] = {"base": base, **_differences(ends[name], ends[base])}
            run["less_base"] |= _difference_of_first(run["curve"], found[base]["curve"])
    shown = study.described()
    if not shown["curve_answers"]:
        del shown["curve_answers"]  # earlier studies are stored without it
    return {"study": shown, "runs": found}


def _summary(events: Sequence[Event]) -> dict[str, Any]:
    log, sums = Log.of(events), energies_by_batch(events)["sum"]
    ends = {when: {"scores": scores, "perplexity": log.perplexity[when]} for when, scores in log.scores.items()}
    reached = {event["batch"]: event.get("reached") for event in log.of_kind("batch")}
    seconds = log.seconds()
    seconds["all"] = log.last("finished").get("seconds", math.fsum(seconds.values()))
    return {
        "edits": log.last("batch").get("edits", 0),
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "before": ends.get("before"),
        "after": ends.get("after"),
        "energy": {"before": sums[0], "after": sums[max(sums)]},
        "layers": {str(layer): [seen[0], seen[-1]] for layer, seen in log.energies.items()},
        "batches": {
            "suppressed": mean_of(log.layer(layer)["suppressed"] for layer in log.energies),
            "over_bound": min((row["closest"] for row in log.bounds() if row["closest"]), default=None),
        },
        "curve": [_thin(event, sums[event["batch"]], reached.get(event["batch"])) for event in log.of_kind("curve")],
        "correlations": correlations(events),
    }


def _without_sphere(found: Mapping[str, Any], name: str) -> str | None:
    """The finished run with the same settings but without SPHERE, for a finished run with SPHERE; else None."""

    def plain(run: str) -> dict[str, Any]:
        settings = {**defaults(), **as_recorded(found[run]["settings"])}
        settings["project"] = settings["project"].replace("solve", "layer")
        return {k: v for k, v in settings.items() if k not in _SPHERE}

    if not found[name]["settings"]["sphere"] or not found[name]["finished"]:
        return None
    bases = (n for n, run in found.items() if run["finished"] and not run["settings"]["sphere"])
    return next((n for n in bases if plain(n) == plain(name)), None)


def _differences(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [(scores, base[request]) for request, scores in own.items() if request in base]
    both = {n: [a[n] - b[n] for a, b in pairs if n in a and n in b] for n in (*SCORES, *FURTHER_SCORES, *_ANSWERS)}
    return {name: Score.of(values).to_dict() for name, values in both.items() if values or name in SCORES}


def _difference_of_first(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Retention: final accuracy on the first edits, less the base's; errors as for independent requests."""
    pair = [curve[-1]["first"].get("efficacy_accuracy") for curve in (own, base) if curve]
    if len(pair) < 2 or None in pair:
        return {}
    a, b = pair
    stderr = None if None in (a["stderr"], b["stderr"]) else math.hypot(a["stderr"], b["stderr"])
    return {"first": {"mean": a["mean"] - b["mean"], "stderr": stderr, "n": a["n"]}}


def _as_written(study: Study, settings: Mapping[str, Any], run: str) -> dict[str, Any]:
    """A run's recorded settings with texts as in the study's file, without folders of this machine."""
    written = study.settings | study.runs[run]
    return {name: written[name] if isinstance(written.get(name), str) else value for name, value in settings.items()}


def _thin(event: Event, energy: float, reached: float | None) -> dict[str, Any]:
    """A curve's event with four digits of each score, and the batch's ``reached`` if known."""
    scores = {
        group: {
            name: {key: value if value is None else round(value, 4) for key, value in score.items()}
            for name, score in event[group].items()
            if score["n"]
        }
        for group in _GROUPS
    }
    further = {} if reached is None else {"reached": round(reached, 4)}
    return {"edits": event["edits"], **scores, "perplexity": event["perplexity"], "energy": energy, **further}


def tables(found: Mapping[str, Any]) -> str:
    """Markdown tables: final scores (in per cent, HE as change), gains with SPHERE, weights, Spearman's ρ."""
    first = next(iter(found["runs"].values()))["before"]
    shown = _shown(first["scores"])
    scored = ["", *(name.replace("_", " ") for name in shown)]
    head = [*scored, "first, accuracy", "newest, accuracy", "perplexity", "doubled by (HE)", "HE", "minutes"]
    rows = [["before", *_shares(first["scores"], shown), "", "", _short(first["perplexity"]), "", "", ""]]
    added, related, weights = [], [], []
    for name, run in found["runs"].items():
        curve = run["curve"][-1] if run["curve"] else {"first": {}, "last": {}}
        end = run["after"] or curve
        label = name.replace("|", "\\|") + ("" if run["finished"] else f" (stopped after {run['edits']} edits)")
        rows.append(
            [
                label,
                *_shares(end["scores"], shown),
                *(_share(curve[group].get("efficacy_accuracy")) for group in ("first", "last")),
                _short(end["perplexity"]),
                _doubled(run),
                _change(run, run["energy"]["after"]),
                f"{run['seconds']['all'] / 60:.0f}",
            ]
        )
        if less := run.get("less_base"):
            added.append([label, *(_share(less.get(score), "+") for score in (*shown, "first"))])
        weights.append([label, *_weights(run)])
        seen = {r["score"]: r for r in run["correlations"] if r["energy"] == "change"}
        if any(r["rho"] is not None for r in seen.values()):
            related.append([label, *(_correlation(seen.get(name)) for name in SCORES)])
    text = _table(head, rows)
    if added:
        text += "\nWhat SPHERE added to the same run without it, in percentage points, where both ended. Errors are "
        text += "of paired differences; for the first edits, of two means:\n\n"
        text += _table([*scored, "first, accuracy"], added)
    text += "\nThe edited weights at the end (of several layers the largest; √2 is the distance of a right angle):\n\n"
    text += _table(["", *_WEIGHTS, "suppressed", "least ‖ΔŴ‖² / bound"], weights)
    if related:
        text += "\nSpearman's ρ of |ΔHE| with each score over the curve (p, n):\n\n"
        text += _table(["", *(name.replace("_", " ") for name in SCORES)], related)
    return text


def _shown(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the scores for tables; token accuracy only if there is no success."""
    tokens = () if (scores.get("efficacy_success") or {}).get("n") else TOKEN_SCORES
    return (*SCORES, *(name for name in (*FOLLOWING_SCORES, *tokens, *_ANSWERS) if name in scores))


def _weights(run: Mapping[str, Any]) -> Iterator[str]:
    ends = [events[-1] for events in run["layers"].values()]
    for name in _WEIGHTS.values():
        known = [event[name] for event in ends if name in event]
        yield "–" if not known else _short(None if None in known else max(known))
    suppressed, over = run["batches"]["suppressed"], run["batches"]["over_bound"]
    yield "–" if not suppressed or "rank" not in ends[0] else f"{100 * suppressed:.2g} %"
    yield "–" if over is None else f"{over:.1e}"


def _change(run: Mapping[str, Any], energy: float) -> str:
    return f"{100 * (energy / run['energy']['before'] - 1):+.2g} %"


def _doubled(run: Mapping[str, Any]) -> str:
    """Edits and HE at the first evaluation during the run with at least twice the ``before`` perplexity."""
    limit = 2 * (run["before"]["perplexity"] or math.nan)
    seen = (e for e in run["curve"] if e["perplexity"] is None or e["perplexity"] >= limit)
    first = next(seen, None)
    return "–" if first is None else f"{first['edits']:,} ({_change(run, first['energy'])})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _shares(scores: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield _share(scores.get(name))


def _share(score: Mapping[str, Any] | None, sign: str = "") -> str:
    if score is None or score["mean"] is None:
        return "–"
    return f"{100 * score['mean']:{sign}z.1f}" + ("" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}")


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _correlation(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None or row["rho"] is None else f"{row['rho']:+.2f} ({row['p']:.1g}, {row['n']})"


def plots(found: Mapping[str, Any]) -> str:
    """One SVG: a panel per measure over the edits, a line per run; a method with and without SPHERE shares a
    colour."""
    from matplotlib import colormaps, style, ticker
    from matplotlib.figure import Figure

    names = list(found["runs"])
    bases = list(dict.fromkeys(name.partition(" + SPHERE")[0] for name in names))
    colours = colormaps["tab10" if len(bases) <= 10 else "tab20"]
    with style.context(["default", _STYLE]):
        panels = _PANELS | {
            title: place
            for title, place in _FURTHER_PANELS.items()
            if any(_points(run, *place) for run in found["runs"].values())
        }
        rows = -(-len(panels) // 3)
        figure = Figure(figsize=(11, 9.5 * rows / 3), layout="constrained")
        lines = {}
        every = figure.subplots(rows, 3).flat
        for axes in every[len(panels) :]:
            axes.remove()
        for axes, (title, (group, score)) in zip(every, panels.items(), strict=False):
            for name in names:
                points = _points(found["runs"][name], group, score)
                if points:
                    base, sphere, more = name.partition(" + SPHERE")
                    dashes = ":" if more else "--" if f"{base} + SPHERE" in names and not sphere else "-"
                    colour = colours(bases.index(base) % colours.N)
                    lines[name] = axes.plot(*zip(*points, strict=True), color=colour, ls=dashes, lw=1.2)[0]
            axes.set_title(title, fontsize=9)
            axes.set_xlim(0, None)
            drawn = [abs(y) for line in axes.lines for y in line.get_ydata()]
            if group in _SCALES and max(drawn, default=0.0) > 10 * min(drawn, default=0.0) and max(drawn) > _WIDE:
                axes.set_yscale(**_SCALES[group])
                axes.yaxis.set_major_formatter(ticker.LogFormatter(linthresh=1.0))
                axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4)
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _points(run: Mapping[str, Any], group: str, score: str) -> list[tuple[int, float]]:
    points = []
    for event in run["curve"]:
        if group == "energy":
            value = 100 * (event["energy"] / run["energy"]["before"] - 1)
        elif group == "perplexity":
            value = event["perplexity"]
        else:
            value = event.get("reached") if group == "reached" else (event[group].get(score) or {}).get("mean")
            value = None if value is None else 100 * value
        if value is not None:
            points.append((event["edits"], value))
    return points
