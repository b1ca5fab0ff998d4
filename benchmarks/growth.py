"""Time of a batch against the edits so far: 200 batches of 100 edits of one layer, fresh keys in each.

``python -m benchmarks.growth`` → ``results/growth.json``; half an hour on two cores. Each shape runs in its own
process; peak memory is noted if the engine is alone in the process. The published way is measured at every twentieth
batch, on the current weight and history. ``--batches`` for fewer (only printed, not stored), ``--only N D`` for one
shape.
"""

from __future__ import annotations

import argparse
import json
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.baselines import streaming
from benchmarks.collect import RESULTS, machine, store
from benchmarks.layer import ALPHA, EDITS, RATIO, RIDGE, Engine, Layer
from benchmarks.memory import status
from sphere_edit.runs.run_folder import environment
from sphere_kernels.streaming import RecursiveLeastSquares

BATCHES, THREADS = 200, 2
LLAMA, WITH_PUBLISHED = (4096, 14336), (1024, 3584)
PUBLISHED_EVERY = 20
Row = dict[str, Any]


def run(shape: tuple[int, int], batches: int) -> list[Row]:
    """Rows of a shape: ours, and the published way if measured."""
    imports = status("VmRSS")
    torch.set_num_threads(THREADS)
    layer = Layer(*shape)
    history = torch.zeros(shape[1], shape[1]) if shape == WITH_PUBLISHED else None
    engine = Engine(layer.weight, RecursiveLeastSquares(RIDGE, shape[1], layer.null_space), 1)
    rows: list[Row] = [{"shape": list(shape), "way": "ours", "numbers": [], "seconds": []}]
    if history is not None:
        rows.append({"shape": list(shape), "way": "published", "numbers": [], "seconds": []})
    for number in range(1, batches + 1):
        keys, left = layer.keys(number), layer.left(number)
        if history is not None:
            if number in (1, 2) or number % PUBLISHED_EVERY == 0:
                projector = torch.eye(shape[1]) - layer.removed @ layer.removed.T
                solver = streaming.AlphaEdit(projector, history.clone(), RIDGE)
                published = streaming.Published(engine.weight.clone(), solver, RATIO, ALPHA)
                _time(published, keys, left, number, rows[1])
            history += keys.T @ keys
        _time(engine, keys, left, number, rows[0])
        if engine.solver.form == "full":
            rows[0].setdefault("full_from", number)
    if history is None:  # else the published way sets the peak
        rows[0] |= {"peak_mb": _mb(status("VmHWM")), "imports_mb": _mb(imports)}
    return rows


def _time(way: Engine | streaming.Published, keys: torch.Tensor, left: torch.Tensor, number: int, row: Row) -> None:
    start = perf_counter()
    way.batch(keys, left)
    row["seconds"].append(round(perf_counter() - start, 4))
    row["numbers"].append(number)
    print(f"{row['shape']} {row['way']}: batch {number}, {row['seconds'][-1]:.3f} s", flush=True)


def _mb(kilobytes: int) -> int:
    return round(kilobytes * 1024 / 1e6)


def main(batches: int, only: tuple[int, int] | None) -> None:
    rows: list[Row] = []
    for shape in [only] if only else [LLAMA, WITH_PUBLISHED]:
        with get_context("spawn").Pool(1) as pool:
            rows += pool.apply(run, (shape, batches))
    for row in rows:
        row |= {"edits": EDITS, "threads": THREADS, "commit": machine()["commit"], "environment": environment()}
        kept = {key: row[key] for key in ("shape", "way", "peak_mb", "imports_mb") if key in row}
        print(kept, f"median {median(row['seconds']):.3f} s, sum {sum(row['seconds']):.0f} s")
    if batches < BATCHES:
        print(f"fewer than {BATCHES} batches: nothing is stored")
        return
    path = RESULTS / "growth.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = [row["shape"] for row in rows]
    store("growth", [row for row in found if row["shape"] not in measured] + rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--only", type=int, nargs=2, metavar=("N", "D"))
    given = parser.parse_args()
    main(given.batches, tuple(given.only) if given.only else None)
