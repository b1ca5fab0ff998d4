"""Terminal output of the commands: tables, progress bars and one-line errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError

from sphere_edit.config import EditConfig, declarations
from sphere_edit.data.loading import Loaded
from sphere_edit.data.requests import FIELDS, Conflict, EditRequest
from sphere_edit.editing.guard import told
from sphere_edit.runs.journal import Journal, resume_command
from sphere_edit.targets.reached import named
from sphere_edit.units import duration

console = Console(emoji=False)  # ":key:" in a name or a prompt is text
errors = Console(stderr=True, emoji=False)


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


MENDABLE = (ValueError, OSError, SafetensorError, ArithmeticError, ImportError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def plain_errors(status: int = 2) -> Iterator[None]:
    """Turn a user's error into one line and an exit status; a bug still gives a traceback."""
    try:
        yield
    except MENDABLE as error:
        complain(str(error))
        raise typer.Exit(status) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted; models and finished outputs are as they were", style="red")
        raise typer.Exit(130) from error


def complain(text: str) -> None:
    errors.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Add a user's error within the block to the problems, and continue after the block."""
    try:
        yield
    except MENDABLE as error:
        problems.append(str(error))


def note(text: str) -> None:
    _plain(f"note: {text}")


@contextmanager
def resume_hint(journal: Journal) -> Iterator[None]:
    """If a run stops early, print the number of safe batches and the resume command."""
    try:
        yield
    except BaseException as error:
        command = resume_command(journal.folder)
        if journal.records and command not in str(error):
            anew = "" if journal.batches else "; or, to change a setting, begin anew with --overwrite"
            note(f"batches kept safe: {journal.batches}; go on with: {command}{anew}")
        raise


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars by name, with the time left; occasional lines if the output is no terminal."""
    if not errors.is_terminal:
        yield Lines().show
        return
    with Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            elif progress.tasks[tasks[what]].finished and done < total:  # a new batch starts its bar anew
                progress.reset(tasks[what])
            progress.update(tasks[what], completed=done, total=total)

        yield show


class Lines:
    """Progress in lines, for output to a file: at most one line per ``EVERY`` seconds, and as many for ends of batches.

    Args:
        write: called with each line.
        now: clock, in seconds.
    """

    EVERY = 30.0

    def __init__(self, write: Callable[[str], None] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write or _plain, now
        self._begun: dict[str, tuple[int, float]] = {}  # by step: amount done at its first report, and time
        self._run: dict[str, tuple[int, int]] = {}  # (done, total) of batches and of edits
        self._last = {"step": now(), "batch": now()}

    def show(self, what: str, done: int, total: int) -> None:
        now = self._now()
        self._begun.setdefault(what, (done, now))
        if what in ("batches", "edits"):
            self._run[what] = done, total
        kind, ended = "batch" if what == "edits" else "step", what == "edits" and done >= total
        if what != "batches" and (ended or now - self._last[kind] >= self.EVERY):
            self._last |= {kind: now, "step": now}
            self._write("; ".join(self._parts(what, done, total, now)))
        if done >= total:
            del self._begun[what]
        if ended:
            self._run.clear()

    def _parts(self, what: str, done: int, total: int, now: float) -> Iterator[str]:
        if "edits" in self._run:
            batch, edits = self._run.get("batches", (0, 0)), self._run["edits"]
            rate, left = self._pace("edits", *edits, now)
            told = f", {rate:.3g} edits/s, {left} left" if left else ""
            yield f"batch {batch[0]} of {batch[1]}, {edits[0]} of {edits[1]} edits{told}"
        if what != "edits":
            _, left = self._pace(what, done, total, now)
            yield f"{what}: {done} of {total}" + (f", {left} left" if left else "")

    def _pace(self, what: str, done: int, total: int, now: float) -> tuple[float, str]:
        """Rate per second and time left; 0 and an empty text if unknown."""
        first, start = self._begun[what]
        if done == first or now <= start:
            return 0.0, ""
        rate = (done - first) / (now - start)
        return rate, duration((total - done) / rate)


def _plain(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def energy_table(events: list[dict[str, Any]]) -> Table:
    """First and last energy of each edited layer."""
    table = Table(title="hyperspherical energy")
    for name in ("layer", "HE before", "HE after", "change", "excess after", "r", "suppressed"):
        table.add_column(name, justify="right", no_wrap=True)
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "energy":
            by_layer.setdefault(event["layer"], []).append(event)
    for layer, seen in sorted(by_layer.items()):
        first, last = seen[0], seen[-1]
        table.add_row(
            str(layer),
            f"{first['energy']:.2f}",
            f"{last['energy']:.2f}",
            f"{last['energy'] - first['energy']:+.2f}",
            f"{last['excess']:+.2f}",
            str(last.get("rank", "-")),
            f"{100 * last.get('suppressed', 0):.1f} %",
        )
    return table


def learned_table(events: list[dict[str, Any]]) -> Table | None:
    """Facts learned and share reached, a row for each of the last ten batches; None if no event has ``learned``."""
    found = [event for event in events if event["event"] == "batch" and event.get("learned") is not None]
    if not found:
        return None
    table = Table(title=f"facts learned: {sum(e['learned'] for e in found)} of {sum(e['size'] for e in found)}")
    for name in ("batch", "learned", "reached", "not learned"):
        table.add_column(name, justify="right" if name != "not learned" else "left")
    for event in found[-10:]:
        reached = event.get("reached")
        counted = f"{event['learned']} of {event['size']}"
        shown = "-" if reached is None else f"{reached:.2f}"
        table.add_row(str(event["batch"]), counted, shown, escape(named(event.get("unlearned", []))))
    return table


def guard_lines(events: list[dict[str, Any]]) -> list[str]:
    """The guard's findings in a run, as lines; empty if no batch stood out."""
    found = [event for event in events if event["event"] == "guard"]
    left = [fact for event in found if event["action"] == "skipped" for fact in event["facts"]]
    lines = [f"guard: {told(event)}" for event in found]
    return [*lines, f"guard: {len(left)} facts were left out"] if left else lines


def data_table(
    name: str, loaded: Loaded, against: Sequence[Conflict], again: Sequence[tuple[EditRequest, EditRequest]]
) -> Table:
    """Contents of a source of requests, and faults that a user may want to mend."""
    table = Table(title=escape(name), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    left = loaded.left_out
    rows: dict[str, list[str]] = {
        "schema": [loaded.schema],
        "requests": [str(len(loaded.requests))],
        "no edits, left out": [str(len(left)), *left[:3]],
        "contradictions": [str(len(against)), *map(str, against[:3])],
        "asked again": [str(len(again)), *(f"{later.id!r} is {first.id!r} again" for first, later in again[:3])],
        "fields not read": [", ".join(loaded.unread) or "none"],
    }
    for what, lines in rows.items():
        table.add_row(what, escape("\n".join(lines)))
    return table


def settings_table(title: str, chosen: EditConfig, unused: Container[str]) -> Table:
    """Settings with value, allowed values and description."""
    table = Table(title=title, show_lines=True)
    table.add_column("setting", no_wrap=True)
    for heading in ("value", "may be", "what it does"):
        table.add_column(heading, overflow="fold")
    for name, setting in declarations(chosen.method).items():
        if name not in unused:
            value = chosen.to_dict()[name]
            table.add_row(name, escape(str(value)), setting.expected, escape(setting.doc.replace("`", "")))
    return table


def plan_table(rows: Mapping[str, Sequence[str]]) -> Table:
    """The plan of a run, from `make_plan`."""
    table = Table(title="what the run will do", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, lines in rows.items():
        table.add_row(what, escape("\n".join(lines)))
    return table


def requests_table(requests: Sequence[EditRequest]) -> Table:
    """Requests as read, a column for each."""
    table = Table(title="as understood", show_header=False)
    table.add_column(no_wrap=True)
    for _ in requests:
        table.add_column(overflow="fold")
    for name in FIELDS:
        values = [getattr(request, name) for request in requests]
        if any(values):
            shown = ["\n".join(map(repr, v)) if isinstance(v, tuple) else repr(v) if v else "" for v in values]
            table.add_row(name, *map(escape, shown))
    return table


def scores_table(events: list[dict[str, Any]]) -> Table:
    """Every score with standard error, one column per evaluation."""
    found = [event for event in events if event["event"] == "evaluation"]
    table = Table(title="scores (mean ± standard error over the requests)")
    table.add_column("metric")
    for event in found:
        table.add_column(event["when"], justify="right")
    table.add_column("n", justify="right")
    for group in ("scores", "ability"):
        for name in found[0].get(group, ()) if found else ():
            scores = [event[group][name] for event in found]
            table.add_row(name.replace("_", " "), *map(_score_text, scores), str(scores[0]["n"]))
    values = [event["perplexity"] for event in found]
    table.add_row("perplexity", *("-" if value is None else f"{value:.2f}" for value in values), "")
    return table


def ability_table(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Every metric of every task, from `general_ability`."""
    table = Table(title="general ability (mean ± standard error over the records)")
    for name in ("task", "metric", "score", "n"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, scores in found.items():
        for metric, score in scores.items():
            table.add_row(task, metric.replace("_", " "), _score_text(score), str(score["n"]))
    return table


def _score_text(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def spectrum_table(rows: list[dict[str, Any]], heading: str) -> Table:
    """Energy and spectrum of every layer, from `layer_energies`."""
    table = Table(title=escape(heading))
    for name in ("layer", "n × d", "HE", "excess", "r", "spectrum"):
        table.add_column(name, justify="right" if name != "spectrum" else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['n']} × {row['d']}",
            f"{row['energy']:.2f}",
            f"{row['excess']:+.2f}",
            str(row["rank"]),
            sparkline(row["eigenvalues"]),
        )
    return table


def sparkline(values: list[float], width: int = 24) -> str:
    """Values as a line of block characters, at most ``width`` wide."""
    if not values or max(values) <= 0:
        return ""
    picked = [values[i * len(values) // width] for i in range(width)] if len(values) > width else values
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * max(value, 0) / max(values))] for value in picked)
