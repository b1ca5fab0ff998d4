"""Tables of long runs: the engine's errors, time and memory over 20,000 edits, and share of an editing run."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.kernel_tables import table

Stored = dict[str, Any]

ERRORS = {
    "solve": 1e-4,
    "projector": 1e-3,
    "projection": None,
    "energy": 1e-8,
    "energy of the run": None,
    "weight": None,
}  # required
MINUTES, PEAK_MB, LONG = 60, 4000, [4096, 14336]  # required at LLaMA3-8B's shape
SHARE = 5  # per cent of the time, at most
ENDS = 20  # batches at either end of a run
FORWARD = ("values", "passes"), ("keys", "check")  # optimised values and keys; the closed loop's rounds and check


def precision(stored: Stored) -> str:
    """Largest errors over all batches against fp64, of ours and of the dense way in fp32."""
    body = []
    for row in stored["rows"]:
        for name, floor in ERRORS.items() if "ours" in row and "batches" in row else ():
            cells = [f"{row[way][name]:.0e}" if name in row[way] else "–" for way in ("ours", "dense fp32")]
            body.append([f"{row['method']}, {name}", cells[0], f"≤ {floor:.0e}" if floor else "", cells[1]])
    return table(["worst of all batches", "ours", "to reach", "dense in fp32"], body)


def growth(stored: Stored) -> str:
    """Seconds of a batch at both ends of the run, seconds of all batches, and peak memory of the process."""
    body = []
    for row in stored["rows"]:
        seconds, whole = row["seconds"], row["way"] == "ours"
        ends = [seconds[:ENDS], seconds[-ENDS:]] if whole else [seconds[:2], seconds[-2:]]
        long = row["shape"] == LONG
        cells = [" × ".join(map(str, row["shape"])), row["way"], *(f"{median(end):.3g}" for end in ends)]
        cells.append(f"{sum(seconds) / 60:.1f}" if whole else "–")
        cells.append(f"≤ {MINUTES}" if long else "")
        cells.append(f"{row['peak_mb'] - row['imports_mb']} ({row['peak_mb']})" if "peak_mb" in row else "–")
        body.append([*cells, f"≤ {PEAK_MB}" if long else ""])
    head = ["n × d", "way", "first batches, s", "last batches, s", "20,000 edits, min", "to reach"]
    return table([*head, "peak, MB (with imports)", "to reach"], body)


def share(stored: Stored) -> str:
    """Share of the batches' time outside the model's own passes."""
    body = []
    for row in stored["rows"]:
        clocks = [batch["seconds"] for batch in row["batches"]]
        sums = {key: sum(clock[key] for clock in clocks) for key in clocks[0]}
        passes = [sum(sums.get(key, 0.0) for key in keys) for keys in FORWARD]
        rest = sum(sums.values()) - sum(passes)
        targets = row["settings"].get("targets", "optimised")
        cells = [row["data"], targets.replace("_", " "), str(row["edits"]), *(f"{s:.1f}" for s in (*passes, rest))]
        to_reach = f"≤ {SHARE} %" if targets == "optimised" else ""
        body.append([*cells, f"{100 * rest / sum(sums.values()):.1f} %", to_reach])
    head = ["run", "targets", "edits", "values or rounds, s", "keys or last look, s", "the rest, s"]
    return table([*head, "share of the rest", "to reach"], body)
