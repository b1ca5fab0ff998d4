"""Store the figures of finished runs: ``python -m benchmarks.collect NAME RUN [RUN ...]`` → ``results/NAME.json``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphere_edit.runs import run_folder

RESULTS = Path(__file__).parent / "results"
_OF_BATCH = ("size", "loss", "nll", "steps", "learned", "reached", "flops", "seconds")


def row(run: Path) -> dict[str, Any]:
    """The figures of one run for the tables."""
    config, events = run_folder.read_config(run), run_folder.read_events(run)
    energies: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "energy":
            energies.setdefault(event["layer"], []).append(event)
    return {
        "run": run.name,
        "model": config["model"],
        "data": Path(config["data"]).name,
        "edits": config["edits"],
        "settings": {**config["settings"], "covariance_text": Path(config["settings"]["covariance_text"]).name},
        "perplexity_text": Path(config["perplexity_text"]).name,
        "environment": config["environment"],
        "evaluations": {e["when"]: {k: e[k] for k in ("scores", "perplexity")} for e in _of(events, "evaluation")},
        "energies": {
            str(layer): {
                "before": seen[0]["energy"],
                "after": seen[-1]["energy"],
                "excess_before": seen[0]["excess"],
                "excess_after": seen[-1]["excess"],
                "rank": seen[-1].get("rank"),
                "suppressed": seen[-1].get("suppressed"),
            }
            for layer, seen in sorted(energies.items())
        },
        "batches": [{k: e[k] for k in _OF_BATCH if k in e} for e in _of(events, "batch")],
        "seconds": sum(e["seconds"] for e in _of(events, "finished")),
    }


def _of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def machine() -> dict[str, Any]:
    cpu = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=RESULTS, check=False)
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": len(cpu),
        "system": platform.system(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``results/NAME.json``: the rows, the machine, and the current commit."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def main(name: str, *paths: str) -> None:
    store(name, [row(Path(path)) for path in paths])


if __name__ == "__main__":
    main(*sys.argv[1:])
