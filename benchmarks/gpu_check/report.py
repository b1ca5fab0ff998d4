"""The files of a check: rows, a summary in Markdown and a plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.cases import Row
from benchmarks.gpu_check.device import ROOT
from benchmarks.kernel_tables import table

RESULTS = ROOT / "benchmarks/results"
IDENTITY = ("op", "case", "shape", "dtype", "dot", "impl", "way")
REHEARSED = "A rehearsal on the CPU: nothing here was measured on a GPU."


def write(found: dict[str, Any], name: str | None, out: Path) -> list[Path]:
    """Write ``gpu-NAME.json``, ``.md`` and, with matplotlib, ``.svg``; returns the paths.

    Raises:
        ValueError: a rehearsal would be written among measurements.
    """
    if found["rehearsed"] and out.resolve().is_relative_to(RESULTS):
        raise ValueError(f"a rehearsal must not be written to {RESULTS}, where measurements are")
    name = "rehearsal" if found["rehearsed"] else name or _slug(found["machine"].get("device", "unknown"))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"gpu-{name}{suffix}" for suffix in (".json", ".md", ".svg")]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    paths[1].write_text(summary(found))
    if not _drawn(found, paths[2]):
        paths.pop()
    return paths


def load(path: Path) -> dict[str, Any]:
    """Load a stored file of measurements.

    Raises:
        ValueError: the file belongs to a rehearsal.
    """
    found: dict[str, Any] = json.loads(path.read_text())
    if found["rehearsed"] or any(row["rehearsed"] for row in found["rows"]):
        raise ValueError(f"{path} is from a rehearsal, not from a GPU")
    return found


def failures(rows: list[Row]) -> list[Row]:
    """The failed rows, without rows of plain PyTorch, which do not make a check fail."""
    return [row for row in rows if row["ok"] is False and row.get("kind") not in ("plain", "compile")]


def line(row: Row) -> str:
    """A row as a line of the log."""
    state = {True: "ok  ", False: "FAIL", None: "skip"}[row["ok"]]
    figures = row.get("failed") or row.get("skipped") or ""
    if row["ok"] and "seconds" in row:
        figures = f"{1e3 * row['seconds']:.3f} ms"
    elif row["ok"] and "error" in row:
        figures = f"error {row['error']:.1e} of {row['budget']:.1e}"
    return f"{state} {label(row)}: {figures}" if figures else f"{state} {label(row)}"


def label(row: Row) -> str:
    parts = ("×".join(map(str, v)) if isinstance(v, list) else str(v) for k in IDENTITY if (v := row.get(k)))
    return " ".join(parts)


def summary(found: dict[str, Any]) -> str:
    """The Markdown page."""
    rows, machine = found["rows"], found["machine"]
    checks = [row for row in rows if row["stage"] == "verify"]
    failed = failures(rows)
    counts = {state: sum(row["ok"] is state for row in checks) for state in (True, False, None)}
    text = [f"# gpu-check: {machine.get('device', 'unknown')}", ""]
    text += [f"**{REHEARSED}**", ""] if found["rehearsed"] else []
    text += [described(machine) + ".", ""]
    text += [f"Checks of values: {counts[True]} passed, {counts[False]} failed, {counts[None]} skipped.", ""]
    if failed:
        text += ["## Failures", "", *(f"- {label(row)}: {row['failed']}" for row in failed), ""]
    skipped = [row for row in rows if row["ok"] is None]
    if skipped:
        text += ["## Skipped", "", *(f"- {label(row)}: {row['skipped']}" for row in skipped), ""]
    for head, made in (("Rates", _rates(rows)), ("Errors of long sums", _depths(checks)), ("Times", _times(rows))):
        if made:
            text += [f"## {head}", "", made, ""]
    return "\n".join(text)


def described(machine: Row) -> str:
    """The machine as one line."""
    return "; ".join([f"{machine.get('device')}", *(f"{key} {machine[key]}" for key in SHOWN if machine.get(key))])


SHOWN = ("arch", "memory_gb", "driver", "cuda", "hip", "torch", "triton", "python", "system", "cuda_module", "commit")


def _rates(rows: list[Row]) -> str:
    found = [row for row in rows if row.get("kind") == "limit" and row["ok"]]
    cells = [
        [f"{row['way']} {row['dtype']} {row['dot']}".strip(), f"{row['tflops']:.1f} TFLOP/s"]
        if "tflops" in row
        else [row["way"], f"{row['gbs']:.0f} GB/s"]
        for row in found
    ]
    return table(["measured in this run", "rate"], cells) if cells else ""


def _depths(rows: list[Row]) -> str:
    """Errors beside the errors of plain fp32: relative to the largest element of a Gram matrix, or to each energy.

    The bias is that of the diagonal, or of the energies.
    """
    found = [row for row in rows if "relative" in row]
    cells = [
        [
            f"{row['op']}, {row['impl']} {row['dtype']} {row['dot']}".strip(),
            str(row["d"]),
            f"{row['relative']:.1e}",
            f"{row['relative_plain_fp32']:.1e}",
            f"{row['bias']:+.1e}",
        ]
        for row in found
    ]
    head = ["of", "d", "error", "of plain fp32", "bias"]
    return table(head, cells) if cells else ""


def compared(rows: list[Row]) -> list[Row]:
    """Ours in each precision beside the fastest eager and compiled plain way, and the share of the machine's rates.

    ``ieee`` and ``tf32x3`` are compared with plain fp32 products, ``tf32`` with the fastest plain way of any kind.
    """
    measured = [row for row in rows if row.get("ok") and "seconds" in row]
    rates = {(row["dtype"], row["dot"]): row["tflops"] * 1e12 for row in measured if "tflops" in row}
    if ("float32", "tf32") in rates:
        rates["float32", "tf32x3"] = rates["float32", "tf32"] / 3
    copy = next((row["gbs"] * 1e9 for row in measured if "gbs" in row), None)
    found = []
    for row in measured:
        if row.get("kind") != "ours":
            continue
        same = [r for r in measured if all(r.get(key) == row[key] for key in ("case", "shape", "dtype"))]
        if row["dot"] in ("ieee", "tf32x3"):
            same = [r for r in same if r["dot"] == "ieee"]
        best = {
            kind: min((r for r in same if r["kind"] == kind), key=lambda r: r["seconds"], default=None)
            for kind in ("plain", "compile")
        }
        rate = rates.get((row["dtype"], row["dot"]))
        limit = max(row["flops"] / rate, row["bytes"] / copy) if rate and copy else None
        found.append(row | {"best": best, "share": limit / row["seconds"] if limit else None})
    return found


def _times(rows: list[Row]) -> str:
    cells = []
    for row in compared(rows):
        beside = []
        for kind in ("plain", "compile"):
            other = row["best"][kind]
            beside += [_ms(other), f"{other['seconds'] / row['seconds']:.1f}×"] if other else ["–", "–"]
        what = [row["case"], "×".join(map(str, row["shape"])), f"{row['dtype']} {row['dot']}".strip(), row["way"]]
        share = f"{100 * row['share']:.0f} %" if row["share"] else "–"
        cells.append([*what, f"{1e3 * row['seconds']:.3f}", share, *beside, f"{row['error']:.0e}"])
    head = ["operation", "shape", "dtype", "ours", "ms", "of the rate", "eager, ms", "ratio", "compile, ms", "ratio"]
    return table([*head, "our error"], cells) if cells else ""


def _ms(row: Row) -> str:
    return f"{1e3 * row['seconds']:.3f} ({row['way']}, {row['dot'] or row['dtype']})"


def _drawn(found: dict[str, Any], path: Path) -> bool:
    """Plot the speed-ups over the fastest plain way, eager or compiled; False without matplotlib or rows."""
    try:
        import matplotlib
        from matplotlib.figure import Figure

        from benchmarks.plots import OURS, PLAIN, STYLE
    except ImportError:
        print("matplotlib is not installed: no plot")
        return False
    bars = []
    for row in compared(found["rows"]):
        others = [other["seconds"] for other in row["best"].values() if other]
        if others:
            bars.append((f"{label(row)}", min(others) / row["seconds"], row["dtype"]))
    if not bars:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1 + 0.17 * len(bars)))
        axes = figure.subplots()
        colours = [OURS if dtype == "float32" else PLAIN for *_, dtype in bars]
        drawn = axes.barh(range(len(bars)), [ratio for _, ratio, _ in bars], color=colours, height=0.7)
        axes.bar_label(drawn, [f"{ratio:.1f}×" for _, ratio, _ in bars], padding=3, fontsize=7)
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=6)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.01)
        axes.grid(axis="y", visible=False)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("times faster than the fastest plain PyTorch way, eager or compiled (green fp32, brown 16-bit)")
        title = REHEARSED if found["rehearsed"] else found["machine"]["device"]
        axes.set_title(title, fontsize=9)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return True


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
