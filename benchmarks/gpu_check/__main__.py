"""``python -m benchmarks.gpu_check``: the whole check; see `benchmarks.gpu_check`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check import report, stages


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU at tiny sizes; measures nothing")
    parser.add_argument("--name", help="of the files that are written: gpu-NAME.json, .md and .svg (the device's name)")
    parser.add_argument("--out", type=Path, help="folder to write to (benchmarks/results; for a rehearsal a new one)")
    parser.add_argument("--stages", nargs="+", choices=stages.STAGES, default=list(stages.STAGES))
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose description contains it")
    parser.add_argument("--patience", type=float, default=600, help="seconds until a case counts as hung (600)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the journal of a stage's process
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns 0 if everything passed, 1 if something failed, 2 if there is no device."""
    options = parsed(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.worker:
        return stages.work(options)

    import torch

    if not options.rehearse and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            "is built for a GPU: see the driver"
            if built
            else "is built for the CPU only: another one, in another place,"
        )
        hint = "" if built else " by make gpu-check VENV=.venv-gpu TORCH_SPEC=... TORCH_ARGS=..."
        print(f"{stages.NONE} (torch {torch.__version__} {why}{hint})", file=sys.stderr)
        return 2
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.rehearse else report.RESULTS)
    return stages.run(options, out)


if __name__ == "__main__":
    sys.exit(main())
