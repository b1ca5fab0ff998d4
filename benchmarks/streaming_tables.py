"""Tables of long runs: the engine's errors, its time and memory over 20,000 edits, its share of an editing run."""

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
}  # to reach
MINUTES, PEAK_MB, LONG = 60, 4000, [4096, 14336]  # to reach at LLaMA3-8B's shape
SHARE = 5  # per cent of the time
ENDS = 20  # batches at either end of a run
OPTIMISED = ("values", "keys")


def precision(stored: Stored) -> str:
    """The worst of all batches, of ours and of the dense way in fp32, against fp64."""
    body = []
    for row in stored["rows"]:
        for name, floor in ERRORS.items() if "ours" in row and "batches" in row else ():
            cells = [f"{row[way][name]:.0e}" if name in row[way] else "–" for way in ("ours", "dense fp32")]
            body.append([f"{row['method']}, {name}", cells[0], f"≤ {floor:.0e}" if floor else "", cells[1]])
    return table(["worst of all batches", "ours", "to reach", "dense in fp32"], body)


def growth(stored: Stored) -> str:
    """Seconds of a batch at the two ends of the run, all of them together, and the peak of the process."""
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
    """What is neither value optimisation nor collection of keys, of the time of the batches."""
    body = []
    for row in stored["rows"]:
        clocks = [batch["seconds"] for batch in row["batches"]]
        sums = {key: sum(clock[key] for clock in clocks) for key in clocks[0]}
        rest = sum(seconds for key, seconds in sums.items() if key not in OPTIMISED)
        cells = [row["data"], str(row["edits"]), *(f"{sums[key]:.1f}" for key in OPTIMISED), f"{rest:.1f}"]
        body.append([*cells, f"{100 * rest / sum(sums.values()):.1f} %", f"≤ {SHARE} %"])
    head = ["run", "edits", "values, s", "keys, s", "the rest, s", "share of the rest", "to reach"]
    return table(head, body)
