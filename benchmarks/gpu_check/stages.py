"""The two stages, each in a process that may die: finished rows are kept, and another process runs the rest."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu_check import report
from benchmarks.gpu_check.cases import Row, run_cases
from benchmarks.gpu_check.device import NONE, ROOT, Device, Rehearsal, facts

STAGES = ("verify", "benchmark")
__all__ = ["NONE", "STAGES", "run", "work"]


def work(options: argparse.Namespace) -> int:
    """Run one stage, in a separate process; returns the exit status."""
    device = Rehearsal() if options.rehearse else Device()
    (stage,) = options.stages
    if options.rehearse and stage == "benchmark":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes half a minute and tests no code of ours
    if stage == "verify":
        from benchmarks.gpu_check.checks import checks as cases
    else:
        from benchmarks.gpu_check.timings import timings as cases
    with options.worker.open("a") as file:
        file.write(json.dumps({"machine": facts(device)}) + "\n")
    return run_cases(cases(device), options.worker, options.skip, options.only, device.synchronize)


def run(options: argparse.Namespace, out: Path) -> int:
    """Run all stages and write the results so far after each one, also after an interrupt."""
    found: dict[str, Any] = {"rehearsed": options.rehearse, "machine": {}, "rows": []}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for stage in options.stages:
            rows: list[Row] = []
            try:
                _stage(options, stage, Path(folder) / f"{stage}.jsonl", found["machine"], rows)
            finally:
                found["rows"] += [{"stage": stage, "rehearsed": options.rehearse} | row for row in rows]
                paths = report.write(found, options.name, out)
    print("\n" + paths[1].read_text())
    print("written:", *map(str, paths))
    idle = [stage for stage in options.stages if not any(row["stage"] == stage for row in found["rows"])]
    for stage in idle:
        print(f"{stage}: there was no case to run ({found['machine'].get('offered')})", file=sys.stderr)
    return int(bool(idle or report.failures(found["rows"])))


def _stage(options: argparse.Namespace, stage: str, journal: Path, machine: Row, rows: list[Row]) -> None:
    """Run a stage to the end, in as many processes as necessary; fills ``machine`` and ``rows`` on the way."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--worker", str(journal)]
    command += ["--stages", stage, "--only", options.only, *(["--rehearse"] if options.rehearse else [])]
    journal.touch()
    skip = 0
    while True:
        with journal.open() as lines:
            lines.seek(0, os.SEEK_END)
            child = subprocess.Popen([*command, "--skip", str(skip)], cwd=ROOT)
            begun, hung = _watch(child, lines, options.patience, machine, rows)
        if child.returncode == 0:
            return
        if begun is not None:
            why = f"no answer in {options.patience:g} s" if hung else f"the process ended: status {child.returncode}"
            _add(rows, begun | {"ok": False, "failed": why})
        if not rows or rows[-1]["number"] < skip:  # no progress: the stage itself is broken
            _add(rows, {"case": stage, "number": skip, "ok": False, "failed": "the stage could not be run; see above"})
            return
        skip = rows[-1]["number"] + 1


def _watch(
    child: subprocess.Popen[bytes], lines: TextIO, patience: float, machine: Row, rows: list[Row]
) -> tuple[Row | None, bool]:
    """Follow the journal until the process ends; returns the unfinished case, if any, and whether the case hung."""
    begun: Row | None = None
    text = ""
    heard = time.monotonic()
    try:
        while True:
            over = child.poll() is not None
            while piece := lines.readline():
                text += piece
                if not text.endswith("\n"):  # still being written
                    break
                line, text, heard = json.loads(text), "", time.monotonic()
                if "machine" in line:
                    if not machine:
                        print(report.described(line["machine"]), flush=True)
                    machine |= line["machine"]
                elif "begun" in line:
                    number = line.pop("begun")
                    begun = line | {"number": number}
                else:
                    begun = None
                    _add(rows, line)
            if over:
                return begun, False
            # Before the first case, a process imports modules and initialises the device.
            if time.monotonic() - heard > (patience if begun else max(patience, 300)):
                child.kill()
                child.wait()
                return begun, True
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _add(rows: list[Row], row: Row) -> None:
    rows.append(row)
    print(report.line(row), flush=True)
