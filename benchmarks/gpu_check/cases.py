"""A case of either stage, and the worker that runs cases in turn and keeps a journal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOST = 3  # exit status of a worker whose device no longer answers


class Wrong(Exception):
    """A wrong result; the arguments are a message and the figures."""


class Skipped(Exception):
    """A case that this machine cannot run."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    info: identifies the case; the beginning of its row.
    run: computes the rest of the row.
    """

    info: Row
    run: Callable[[], Row]

    @property
    def label(self) -> str:
        return " ".join(str(value) for value in self.info.values() if value not in (None, ""))


def run_cases(cases: Iterable[Case], journal: Path, skip: int, only: str, synchronize: Callable[[], None]) -> int:
    """Run the cases from number ``skip`` on; returns the exit status.

    The journal has two lines per case: ``{"begun": number, ...}``, then the case's row.
    """
    with journal.open("a") as file:

        def note(line: Row) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for number, case in enumerate(cases):
            if number < skip or only not in case.label:
                continue
            note({"begun": number, **case.info})
            row, began = case.info | {"number": number}, time.monotonic()
            try:
                row |= {"ok": True} | case.run()
            except Skipped as why:
                row |= {"ok": None, "skipped": str(why)}
            except Wrong as wrong:
                row |= {"ok": False, "failed": wrong.args[0]} | wrong.args[1]
            except Exception as error:
                row |= {"ok": False, "failed": f"{type(error).__name__}: {error}"[:500]}
            row["took"] = round(time.monotonic() - began, 3)
            try:
                synchronize()
            except RuntimeError as error:
                note(row | {"ok": False, "failed": row.get("failed") or str(error)[:500]})
                return LOST
            note(row)
    return 0
