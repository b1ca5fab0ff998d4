"""Plots of the README and `docs/benchmarks.md`, from stored rows: ``python -m benchmarks.plots``."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import nan
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import Comparison, Timing, comparisons
from benchmarks.tables import RESULTS, STUDIES, load

PLOTS = RESULTS / "plots"
PLAIN_WAYS = ("plain", "triangle")
CASES = {  # case: (file, kinds to compare with)
    "energy": ("energy", PLAIN_WAYS),
    "energy with gradient": ("energy", PLAIN_WAYS),
    "gram update with energy": ("gram", PLAIN_WAYS),
    "directions": ("directions", ("published",)),
    "projection": ("projection", ("published",)),
    "streaming, refreshed every batch": ("streaming", ("published",)),
    "streaming, refreshed every 10 batches": ("streaming", ("published",)),
}
EIGENPROBLEMS = ("directions", "streaming")  # files of cases without the limit by rates
LIMITED = [case for case, (file, _) in CASES.items() if file not in EIGENPROBLEMS]
OURS, PLAIN, PUBLISHED = "#0b6e4f", "#b5651d", "#8b1e3f"
FEATURES, NEURONS = 1024, 2048  # the fixed one while the other grows
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sphere",  # the same rows give the same file
}


def ratios(axes: Axes) -> None:
    """Speed-ups over the fastest plain way, or over the published way."""
    bars = [(case, c, ratio) for case, c in _all(list(CASES)) if (ratio := c.ratio(*CASES[case][1]))]
    colours = [PLAIN if CASES[case][1] == PLAIN_WAYS else PUBLISHED for case, _, _ in bars]
    _bars(axes, [(case, c) for case, c, _ in bars], [ratio for *_, ratio in bars], colours, "{:.1f}×")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than the fastest plain PyTorch way (brown) or the published way (red)")


def shares(axes: Axes) -> None:
    """Useful rates as shares of the machine's rates for ``torch.mm`` and for a copy."""
    found = _all(LIMITED)
    _bars(axes, found, [100 * c.share for _, c in found], [OURS] * len(found), "{:.0f} %")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("useful work over what torch.mm or a copy manages in the same run, %")


def memory(axes: Axes) -> None:
    """Extra memory of the energy as n grows."""
    _lines(axes, 0, lambda timing: timing.memory or nan, f"neurons n (d = {FEATURES})", "extra memory, MB")


def growth_n(axes: Axes) -> None:
    """Time of the energy as n grows."""
    _lines(axes, 0, lambda timing: 1e3 * timing.seconds, f"neurons n (d = {FEATURES})", "time, ms")


def growth_d(axes: Axes) -> None:
    """Time of the energy as d grows."""
    _lines(axes, 1, lambda timing: 1e3 * timing.seconds, f"features d (n = {NEURONS})", "time, ms")


def growth(axes: Axes) -> None:
    """Time of a batch over the number of edits."""
    names = {(4096, 14336): "LLaMA3-8B: 4096 × 14336"}
    for row in load("growth")["rows"]:
        mine, shape = row["way"] == "ours", tuple(row["shape"])
        line, colour = ("-" if shape in names else "--", OURS) if mine else ("o:", PUBLISHED)
        label = f"{row['way']}, {names.get(shape, ' × '.join(map(str, shape)))}"
        edits = [row["edits"] * number for number in row["numbers"]]
        axes.plot(edits, row["seconds"], line, color=colour, label=label, markersize=3, linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.01)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(0, 20001, 5000))
    axes.set(xlabel="edits so far (100 a batch)", ylabel="time of a batch, s")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.62))


def retention(axes: Axes) -> None:
    """Share of all facts edited so far that the model answers, with SPHERE and without, in the long study."""
    runs = json.loads((STUDIES.parent / "results/loop_scale.json").read_text())["runs"]
    for name, colour in {"AlphaEdit + SPHERE": OURS, "AlphaEdit": PUBLISHED}.items():
        curve = runs[name]["curve"]
        scores = [seen["scores"]["efficacy_accuracy"] for seen in curve]
        shares, errors = ([100 * score[key] for score in scores] for key in ("mean", "stderr"))
        edits = [seen["edits"] for seen in curve]
        axes.errorbar(edits, shares, errors, color=colour, label=name, marker="o", markersize=4, capsize=2)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, 20001, 5000))
    axes.set(xlabel="facts edited into SmolLM2-135M", ylabel="facts so far that it answers, %")
    axes.legend(frameon=False)


def _all(cases: list[str]) -> list[tuple[str, Comparison]]:
    stored = {file: load(file) for file in {CASES[case][0] for case in cases}}
    return [(case, c) for case in cases for c in comparisons(stored[CASES[case][0]], case)]


def _bars(axes: Axes, rows: list[tuple[str, Comparison]], values: list[float], colours: list[str], label: str) -> None:
    drawn = axes.barh(range(len(rows)), values, color=colours, height=0.7)
    axes.bar_label(drawn, [label.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{case} {'×'.join(map(str, c.shape))}" for case, c in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.grid(axis="y", visible=False)


def _lines(axes: Axes, along: int, value: Callable[[Timing], float], xlabel: str, ylabel: str) -> None:
    """Draw ours and the plain ways that were measured at every shape."""
    fixed = (NEURONS, FEATURES)[1 - along]
    found = [c for c in comparisons(load("energy"), "energy") if c.shape[1 - along] == fixed]
    found.sort(key=lambda c: c.shape)
    sizes = [c.shape[along] for c in found]
    others = iter([(PLAIN, "-"), (PLAIN, "--"), ("#6c757d", ":")])
    for first in found[0].timings:
        timings = [t for c in found if (t := c.named(first.way))]
        if first.kind in ("ours", *PLAIN_WAYS) and len(timings) == len(found):
            mine = first.kind == "ours"
            colour, line = (OURS, "-") if mine else next(others)
            label = "ours" if mine else first.way
            axes.plot(sizes, [value(t) for t in timings], line, color=colour, label=label, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)


SMALL = (5, 3.2)
DRAWN = {  # name: (function, size in inches)
    "ratios": (ratios, (7.5, 7.8)),
    "shares": (shares, (7.5, 6.5)),
    "memory": (memory, SMALL),
    "growth_n": (growth_n, SMALL),
    "growth_d": (growth_d, SMALL),
    "growth": (growth, SMALL),
    "retention": (retention, (6, 3)),
}


def main() -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, (draw, size) in DRAWN.items():
            figure = Figure(figsize=size)
            draw(figure.subplots())
            figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
