"""The table of docs/support.md, from the registry of implementations: ``python -m benchmarks.support``."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.kernel_tables import filled, table
from sphere_kernels import dispatch

PAGE = Path(__file__).resolve().parents[1] / "docs/support.md"
COLUMNS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = {"pair_energy": "hyperspherical_energy"}  # operations whose function has another name
INTERNAL = ("products",)


def support() -> str:
    """A row per operation and implementation, a column per dtype."""
    rows = []
    for op, impl, dtypes, backward in dispatch.table():
        if op not in INTERNAL:
            entry = "forward, backward" if backward else "forward"
            cells = [entry if dtype in dtypes else "–" for dtype in COLUMNS]
            rows.append([f"`{NAMES.get(op, op)}`", f"`{impl}`", *cells])
    head = ["operation", "implementation", *(str(dtype).removeprefix("torch.") for dtype in COLUMNS)]
    return table(head, rows, "---")


def render(page: str) -> str:
    """``page`` with its table written anew."""
    return filled(page, lambda name: {"support": support}[name]())


def write() -> None:
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    write()
