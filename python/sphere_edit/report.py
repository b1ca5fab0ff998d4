"""The page of a run: one HTML file that needs nothing else, made from the run folder alone.

Text of models and data files reaches the page only through `_printable` and jinja2's autoescape, never a plot. The
plots name their colours by placeholders that become CSS variables, so one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from sphere_edit import runs
from sphere_edit.data.reading import read_records
from sphere_edit.files import replacing
from sphere_edit.metrics import METRICS
from sphere_edit.requests import EditRequest

Event = dict[str, Any]

_SHOWN, _LONGEST = 50, 600
_STAGES = {"values": "optimise values", "keys": "collect keys", "project": "directions, project"}
_STAGES |= {"update": "write, energy", "record": "record, hash", "keep": "write batch files"}
_INK, _MUTED, _LINE = "#010101", "#010102", "#010103"
_SERIES = ["#010111", "#010112", "#010113", "#010114", "#010115", "#010116"]
_CSS = {_INK: "currentColor", _MUTED: "var(--muted)", _LINE: "var(--line)"}
_CSS |= {colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)}
_STYLE: dict[str, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "sphere-edit", "text.parse_math": False, "font.size": 10},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _MUTED),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **{"grid.color": _LINE, "grid.linewidth": 0.6, "lines.linewidth": 1.4, "lines.markersize": 3.5},
    **{"legend.frameon": False, "legend.handlelength": 1.8, "legend.fontsize": 10, "legend.title_fontsize": 10},
}
_PICTURES = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_FORBIDDEN = {*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0)}
_FORBIDDEN |= {plane | last for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)}
_UNPRINTABLE = dict.fromkeys(_FORBIDDEN, 0xFFFD) | _PICTURES
_JINJA: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}


def write_report(run: Path) -> Path:
    """Make ``report.html`` of a run folder from its config, events and requests; an unfinished run shows what it has.

    The page is written whole or not at all, loads nothing, runs no script, and is the same for the same files.

    Returns:
        The path of the page.

    Raises:
        RunError: not a run folder, of another version, or without events.
        DataError: its requests are missing or damaged.
    """
    config, events = runs.read_config(run), runs.read_events(run)
    if not events:
        raise runs.RunError(f"{run / runs.METRICS} has no events; expected those of a run")
    first = islice(read_records(run / runs.REQUESTS), _SHOWN)
    requests = [EditRequest.from_dict(record.fields) for record in first]
    try:
        page = render(config, events, requests)
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise runs.RunError(f"{run / runs.METRICS} has an event that is not as expected: {error!r}") from error
    with replacing(run / runs.REPORT) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return run / runs.REPORT


def render(config: Mapping[str, Any], events: Sequence[Event], requests: Sequence[EditRequest]) -> str:
    """The page as text: any figure that the events lack is a dash, any part without figures is left out."""
    log = Log.of(events)
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, finalize=_printable, **_JINJA)
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "plain": plain}
    settings = config.get("settings") or {}
    layers = [{"layer": layer, **log.layer(layer)} for layer in log.energies]
    with style.context(["default", _STYLE]):
        plots = {
            "energy": _over_edits(log, "energy", "Change of HE", _change),
            "metrics": _metrics_plot(log.scores),
            "spectrum": _spectrum_plot(log),
            "suppressed": settings.get("sphere", True)
            and _over_edits(log, "suppressed", "Update suppressed, %", _suppressed),
            "norm": _over_edits(log, "norm", "Norm, % of weight", _relative_norm),
        }
    rows = list(zip_longest(requests, log.of_kind("request")[: len(requests)]))
    template = environment.get_template("report.html", globals={"metrics": METRICS})
    return template.render(config=config, settings=settings, log=log, layers=layers, plots=plots, rows=rows)


@dataclass(frozen=True)
class Log:
    """The events of a run: energies by layer, from before any edit on; the rest by ``before`` and ``after``."""

    events: Sequence[Event]
    energies: dict[int, list[Event]]
    scores: dict[str, dict[str, Any]]
    perplexity: dict[str, Any]
    spectra: dict[str, dict[int, Event]]

    @classmethod
    def of(cls, events: Sequence[Event]) -> Log:
        log = cls(events, {}, {}, {}, {"before": {}, "after": {}})
        for event in sorted(log.of_kind("energy"), key=lambda e: (int(e["layer"]), e["batch"])):
            log.energies.setdefault(int(event["layer"]), []).append(event)
        for event in log.of_kind("evaluation"):
            log.scores[event["when"]], log.perplexity[event["when"]] = event["scores"], event.get("perplexity")
        for event in log.of_kind("spectrum"):
            log.spectra[event["when"]][int(event["layer"])] = event
        return log

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if isinstance(event, dict) and event.get("event") == kind]

    def last(self, kind: str) -> Event:
        return (self.of_kind(kind) or [{}])[-1]

    def score(self, name: str, when: str) -> dict[str, Any]:
        return self.scores.get(when, {}).get(name) or {"mean": None, "stderr": None, "n": None}

    def excess(self, when: str) -> float:
        """Of all edited layers together."""
        return math.fsum(seen[-1 if when == "after" else 0]["excess"] for seen in self.energies.values())

    def layer(self, layer: int) -> dict[str, Any]:
        """First and last energies of a layer, its directions, and the mean size of its updates."""
        seen, before, after = self.energies[layer], *(self.spectra[w].get(layer, {}) for w in ("before", "after"))
        directions = len((before or after).get("eigenvalues", [])) or None
        ends = {"first": seen[0], "last": seen[-1], "r_before": before.get("rank"), "r_after": after.get("rank")}
        means = {name: _mean(e.get(name) for e in seen[1:]) for name in ("suppressed", "update_norm", "residual")}
        return {**ends, **means, "directions": directions}

    def most_moved(self) -> int | None:
        """The layer whose energy the run changed most."""
        moved = {layer: abs(_change(seen[-1], seen[0])) for layer, seen in self.energies.items()}
        return max(moved, key=moved.__getitem__, default=None)

    def stages(self) -> list[tuple[str, float]]:
        """(stage, seconds) over all batches, then whatever else the whole run took."""
        sums: dict[str, float] = {}
        for event in self.of_kind("prepared"):
            sums["prepare (contexts, key covariance)"] = event.get("seconds", 0.0)
        for event in self.of_kind("batch"):
            for name, seconds in event.get("seconds", {}).items():
                stage = _STAGES.get(name, name)
                sums[stage] = sums.get(stage, 0.0) + seconds
        if total := self.last("finished").get("seconds"):
            sums["evaluate, sample, write files"] = max(0.0, total - sum(sums.values()))
        return list(sums.items())


def number(value: float | None, digits: int = 2) -> str:
    """Grouped in thousands; a dash for what is not there."""
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    return number(value, digits) if value is None or value < 0 else "+" + number(value, digits)


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else number(100 * share, digits) + "\u00a0%"


def plain(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _printable(value: Any) -> Any:
    """Text without what HTML forbids (controls become their pictures, surrogates U+FFFD), cut where absurdly long."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return (value if len(value) <= _LONGEST else value[:_LONGEST] + "…").translate(_UNPRINTABLE)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def _change(event: Event, first: Event) -> float:
    return event["energy"] - first["energy"]


def _suppressed(event: Event, _: Event) -> float | None:
    return 100 * event["suppressed"] if event.get("suppressed") is not None else None


def _relative_norm(event: Event, _: Event) -> float | None:
    norm, whole = event.get("update_norm"), event.get("weight_norm")
    return 100 * norm / whole if norm is not None and whole else None


def _plot(name: str, label: str, draw: Callable[[Axes], None], columns: int, title: str = "") -> Markup:
    """An inline SVG that scales with its column; ``columns`` of the legend below it. ``name`` keeps its ids apart."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    draw(figure.subplots())
    figure.legend(loc="outside lower center", ncols=columns, title=title, columnspacing=1.2, handletextpad=0.5)
    figure.savefig(buffer := io.StringIO(), format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"^.*?(?=<svg )|<style.*?</style>", "", buffer.getvalue().strip(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(_CSS), lambda match: _CSS[match[0]], svg)
    svg = re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, flags=re.DOTALL)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))


def _over_edits(log: Log, name: str, what: str, value: Callable[[Event, Event], float | None]) -> Markup | None:
    """One line a layer over the number of edits, through ``value(event, first event)`` where there is one."""
    found = {
        layer: [(e["edits"], y) for e in seen if (y := value(e, seen[0])) is not None and math.isfinite(y)]
        for layer, seen in log.energies.items()
    }
    lines = {layer: points for layer, points in found.items() if points and points[-1][0] > 0}
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for i, (layer, points) in enumerate(lines.items()):
            look = _SERIES[i % 6], ("-", "--", ":")[i // 6 % 3], "osD^vP"[i % 6] if len(points) <= 40 else ""
            axes.plot(*zip(*points, strict=True), label=str(layer), color=look[0], ls=look[1], marker=look[2])
        top = 1.08 * max(y for points in lines.values() for _, y in points) or 1
        axes.set(xlabel="Edits so far", ylabel=what, xlim=(0, None), ylim=None if name == "energy" else (0, top))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))

    ends = ", ".join(f"layer {layer} {points[-1][1]:+.3g}" for layer, points in lines.items())
    return _plot(name, f"{what}, one line per layer over edits; at the end: {ends}", draw, min(6, len(lines)), "Layer")


def _metrics_plot(scores: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    names = [f"{metric}_{kind}" for metric in METRICS for kind in ("success", "accuracy")]
    found: dict[str, list[tuple[int, float, float]]] = {
        when: [
            (i, 100 * of[name]["mean"], 100 * (of[name]["stderr"] or 0.0))
            for i, name in enumerate(names)
            if of.get(name) and of[name]["mean"] is not None
        ]
        for when, of in scores.items()
    }
    if not any(found.values()):
        return None

    def draw(axes: Axes) -> None:
        for when, shift, marker, colour in (("before", -0.14, "o", _MUTED), ("after", 0.14, "s", _SERIES[0])):
            if points := found.get(when):
                rows, means, errors = zip(*points, strict=True)
                look: dict[str, Any] = {"color": colour, "markersize": 5, "elinewidth": 1.2, "capsize": 2.5}
                look["markerfacecolor"] = "none" if when == "before" else colour
                axes.errorbar(means, [row + shift for row in rows], xerr=errors, fmt=marker, label=when, **look)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set(xlabel="Requests, %", xlim=(-3, 103), ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)

    said = [f"{names[i].replace('_', ' ')} {when} {mean:.1f} %" for when in found for i, mean, _ in found[when]]
    return _plot("metrics", f"Scores before and after editing: {', '.join(said)}", draw, 2)


def _spectrum_plot(log: Log) -> Markup | None:
    """Share of each principal direction: the most changed layer in front, the others thin behind it."""
    main = log.most_moved()
    shares = {  # the eigenvalues sum to 1
        when: {layer: [100 * v for v in e["eigenvalues"]] for layer, e in of.items() if e.get("eigenvalues")}
        for when, of in log.spectra.items()
    }
    when = "after" if main in shares["after"] else "before"
    if main not in shares[when]:
        return None
    front, rank = shares[when][main], int(log.spectra[when][main].get("rank") or 0)

    def draw(axes: Axes) -> None:
        for i, values in enumerate(values for layer, values in shares[when].items() if layer != main):
            label = "" if i else f"other layers, {when}"
            axes.plot(range(1, len(values) + 1), values, color=_MUTED, linewidth=0.6, alpha=0.6, label=label)
        at = range(1, len(front) + 1)
        axes.fill_between(at[:rank], front[:rank], color=_SERIES[0], alpha=0.2, linewidth=0, label=f"first r = {rank}")
        axes.plot(at, front, color=_SERIES[0], label=f"layer {main}, {when}")
        if when == "after" and main in shares["before"]:
            axes.plot(at, shares["before"][main], color=_SERIES[1], linestyle="--", label=f"layer {main}, before")
        axes.set(xlabel="Direction, largest first", ylabel="Share of the spectrum, %", xlim=(0, len(front) + 1))
        if rank and front[0] > 30 * front[rank - 1] > 0:  # one direction outweighs all: linear would show it alone
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(front[-1], 1e-5 * front[0]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)

    label = f"Spectrum of layer {main}: the first {rank} of {len(front)} directions are shaded"
    return _plot("spectrum", label, draw, 2)
