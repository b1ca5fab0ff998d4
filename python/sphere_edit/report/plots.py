"""The plots of a run's page, as inline SVG.

Plots name their colours by placeholders that become CSS variables, so one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from sphere_edit.evaluation.metrics import FOLLOWING, FOLLOWING_SCORES, METRICS, SCORES
from sphere_edit.events import Event
from sphere_edit.report.event_log import Log, energy_change

_INK, _MUTED, _LINE = "#010101", "#010102", "#010103"
_SERIES = ["#010111", "#010112", "#010113", "#010114", "#010115", "#010116"]
_ALL_METRICS = [(metric.replace("_", " "), metric, "scores") for metric in (*METRICS, *FOLLOWING)]
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


def draw_plots(log: Log, sphere: bool) -> dict[str, Markup | None]:
    """All plots by name; None for a plot without figures, and for suppression without ``sphere``."""
    with style.context(["default", _STYLE]):
        return {
            "energy": _over_edits(log, "energy", "Change of HE", energy_change),
            "metrics": _metrics_plot(log.scores),
            "spectrum": _spectrum_plot(log),
            "suppressed": _over_edits(log, "suppressed", "Update suppressed, %", _suppressed) if sphere else None,
            "norm": _over_edits(log, "norm", "Norm, % of weight", _relative_norm),
            "moved": _over_edits(log, "moved", "Mean distance moved", lambda event, _: event.get("moved_mean")),
            "condition": _over_edits(log, "condition", "Condition number", lambda event, _: event.get("condition")),
            "bound": _bound_plot(log),
            "cosines": _cosine_map(log),
            "curve": _curve_plot(log),
            "answers": _answers_plot(log),
            "retention": _retention_plot(log),
            "ability": _ability_plot(log),
            "perplexity": _perplexity_plot(log),
        }


def _suppressed(event: Event, _: Event) -> float | None:
    return 100 * event["suppressed"] if event.get("suppressed") is not None else None


def _relative_norm(event: Event, _: Event) -> float | None:
    norm, whole = event.get("update_norm"), event.get("weight_norm")
    return 100 * norm / whole if norm is not None and whole else None


def _plot(name: str, label: str, draw: Callable[[Axes], None], columns: int, title: str = "") -> Markup:
    """An inline SVG that scales with the column of the page.

    Args:
        name: keeps the ids of the plot apart from other plots'.
        columns: columns of the legend below the plot.
    """
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
    """One line per layer over the number of edits, through every ``value(event, first event)`` that is not None."""
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
    names = (*SCORES, *(name for name in FOLLOWING_SCORES if any(name in of for of in scores.values())))
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
    """Share of each principal direction: the most changed layer in front, the other layers thin behind."""
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
        if rank and front[0] > 30 * front[rank - 1] > 0:  # on a linear axis one direction would hide all others
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(front[-1], 1e-5 * front[0]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)

    label = f"Spectrum of layer {main}: the first {rank} of {len(front)} directions are shaded"
    return _plot("spectrum", label, draw, 2)


def _lines(
    name: str,
    label: str,
    what: str,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    looks: Mapping[str, Mapping[str, Any]],
    **axis: Any,
) -> Markup | None:
    """Named lines over the number of edits, without empty lines; ``axis`` is set on the axes."""
    there = {key: points for key, points in lines.items() if points}
    if not there:
        return None

    def draw(axes: Axes) -> None:
        for key, points in there.items():
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) <= 40 else "", **looks[key])
        axes.set(xlabel="Edits so far", ylabel=what, xlim=(0, None), **axis)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if axis.get("yscale") == "log":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    ends = ", ".join(f"{key} {points[-1][1]:.3g}" for key, points in there.items())
    return _plot(name, f"{label}; at the end: {ends}", draw, 2)


def _bound_plot(log: Log) -> Markup | None:
    """The theorem's bound and the change of the output, as shares, for the layer whose energy changed most."""
    main = log.most_moved()
    seen = [event for event in log.measured(main) if event.get("bound") is not None] if main is not None else []

    def points(name: str, parts: Callable[[Event], float]) -> list[tuple[int, float]]:
        found = [(e["edits"], e[name] / parts(e)) for e in seen if e.get(name) is not None and parts(e)]
        return [(edits, y) for edits, y in found if y > 0]

    lines = {
        "output on text": points("output_change", lambda event: 1),
        "‖ΔŴ‖² / n": points("step_squared", lambda event: event["neurons"]),
        "bound / n": points("bound", lambda event: event["neurons"]),
    }
    looks = {key: {"color": colour} for key, colour in zip(lines, _SERIES, strict=False)}
    label = f"Bound and change of layer {main} per batch, on a logarithmic scale"
    return _lines("bound", label, "Share of the squared norm", lines, looks, yscale="log")


def _curve(log: Log, name: str, of: str = "scores") -> list[tuple[int, float]]:
    """A score in per cent over edits, from the evaluations along the run."""
    found = [(e["edits"], ((e.get(of) or {}).get(name) or {}).get("mean")) for e in log.of_kind("curve")]
    return [(edits, 100 * mean) for edits, mean in found if mean is not None]


def _two_kinds(
    log: Log, parts: Iterable[tuple[str, str, str]], solid: str, dashed: str
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, dict[str, Any]]]:
    """A solid and a dashed line of one colour per part; a part is (label, metric, group in a curve's event)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    looks: dict[str, dict[str, Any]] = {}
    for (said, metric, of), colour in zip(parts, _SERIES, strict=False):
        for kind, dash in ((solid, "-"), (dashed, "--")):
            lines[f"{said} {kind}"] = _curve(log, f"{metric}_{kind}", of)
            looks[f"{said} {kind}"] = {"color": colour, "linestyle": dash}
    return lines, looks


def _curve_plot(log: Log) -> Markup | None:
    lines, looks = _two_kinds(log, _ALL_METRICS, "success", "accuracy")
    return _lines("curve", "Scores over edits", "Requests, %", lines, looks, ylim=(-3, 103))


def _answers_plot(log: Log) -> Markup | None:
    lines, looks = _two_kinds(log, _ALL_METRICS, "contains", "exact")
    return _lines("answers", "Answers over edits", "Requests, %", lines, looks, ylim=(-3, 103))


def _ability_plot(log: Log) -> Markup | None:
    names = list(dict.fromkeys(name for event in log.of_kind("curve") for name in event.get("ability", ())))
    said = [name.replace("_", " ") for name in names]
    lines = {own: _curve(log, name, "ability") for name, own in zip(names, said, strict=True)}
    looks = {own: {"color": colour} for own, colour in zip(said, _SERIES, strict=False)}
    return _lines("ability", "General ability over edits", "Records, %", lines, looks, ylim=(-3, 103))


def _retention_plot(log: Log) -> Markup | None:
    parts = {"first": "first,", "scores": "all so far,", "last": "newest,"}
    lines, looks = _two_kinds(log, ((said, "efficacy", of) for of, said in parts.items()), "success", "accuracy")
    if not any(lines[f"{parts[of]} {kind}"] for of in ("first", "last") for kind in ("success", "accuracy")):
        return None
    return _lines("retention", "Efficacy over edits", "Efficacy, %", lines, looks, ylim=(-3, 103))


def _perplexity_plot(log: Log) -> Markup | None:
    points = [(e["edits"], e["perplexity"]) for e in log.of_kind("curve") if e.get("perplexity") is not None]
    if len({value for _, value in points}) < 2:
        return None
    large = max(value for _, value in points) > 30 * min(value for _, value in points) > 0
    lines, looks = {"perplexity": points}, {"perplexity": {"color": _SERIES[0]}}
    axis: dict[str, Any] = {"yscale": "log"} if large else {}
    return _lines("perplexity", "Perplexity over edits", "Perplexity", lines, looks, **axis)


def _cosine_map(log: Log) -> Markup | None:
    """Cosines of sampled neurons of the layer whose energy changed most: before below the diagonal, after above."""
    main, levels, size = log.most_moved(), 10, 7
    if main is None or not all(main in log.cosines[when] for when in ("before", "after")):
        return None
    before, after = (log.cosines[when][main]["cosines"] for when in ("before", "after"))
    values = [abs(value) for of in (before, after) for row in of for value in row]
    most = max(values, default=0.0) or 1.0
    cells: dict[tuple[bool, int], list[str]] = {}
    for i, (was, now) in enumerate(zip(before, after, strict=True)):
        for j, (old, new) in enumerate(zip(was, now, strict=True), i + 1):
            for value, x, y in ((old, i, j), (new, j, i)):
                if level := round(levels * abs(value) / most):
                    cells.setdefault((value > 0, level), []).append(f"M{x} {y}h1v1h-1z")
    paths = "".join(
        f'<path fill="var(--s{1 if positive else 0})" fill-opacity="{level / levels:g}" d="{"".join(squares)}"/>'
        for (positive, level), squares in sorted(cells.items())
    )
    n = len(before)
    label = f"Cosines of {n} neurons of layer {main}, before below and after above the diagonal, up to {most:.3g}"
    scale = "".join(
        f'<rect x="{x}" y="{size * n + 8}" width="7" height="7" fill="var(--s{colour})"/>'
        f'<text x="{x + 10}" y="{size * n + 14}">{text}</text>'
        for x, colour, text in ((0, 1, f"up to +{most:.2f}"), (size * n / 2, 0, f"down to −{most:.2f}"))
    )
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="-1 -1 {size * n + 2} {size * n + 18}" font-size="7" '
        f'fill="currentColor"><g transform="scale({size})" shape-rendering="crispEdges">{paths}'
        f'<path d="M0 0L{n} {n}M0 0H{n}V{n}H0Z" fill="none" stroke="var(--muted)" stroke-width="0.12"/></g>'
        f"{scale}</svg>"
    )
