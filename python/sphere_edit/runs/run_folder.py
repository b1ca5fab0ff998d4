"""The folder of a run.

    config.yaml          model, data, settings, versions
    requests.jsonl       the edits in order
    before.json          the snapshot from before the first edit: scores and completions
    judged.jsonl         questions to a judge and its replies, see `evaluation.judge`; only in runs with a judge
    batches/, checkpoints/, journal.jsonl, set-aside/, lock
                         the record of each batch, safe before the next batch begins: see `journal`
    metrics.jsonl        one event a line; made anew from the journal when a run is resumed
    deltas.safetensors   per edited weight the bits that the run changed; see `deltas`
    report.html          the page made from the above
    model/               the edited model, on request

The last three appear when the run is complete.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import sphere_kernels
from sphere_edit.data.reading import read_records
from sphere_edit.data.records import BatchRecord, LayerRecord
from sphere_edit.data.requests import EditRequest
from sphere_edit.events import SCHEMA
from sphere_edit.files import (
    file_sha256,
    flush,
    make_folder,
    new_folder,
    read_facts,
    replacing,
    umask,
)
from sphere_edit.runs.journal import (
    BATCHES,
    CHECKPOINTS,
    FORMAT,
    JOURNAL,
    LOCK,
    SET_ASIDE,
    Journal,
    Record,
    RunError,
    locked,
    resume_command,
)
from sphere_edit.updates import factors, of_factors

CONFIG, REQUESTS, BEFORE, JUDGED, METRICS, DELTAS, REPORT, MODEL = (
    "config.yaml",
    "requests.jsonl",
    "before.json",
    "judged.jsonl",
    "metrics.jsonl",
    "deltas.safetensors",
    "report.html",
    "model",
)
_BEGINNING = (CONFIG, REQUESTS, LOCK)
_NAMES = (*_BEGINNING, BEFORE, JUDGED, METRICS, DELTAS, REPORT, MODEL, JOURNAL, BATCHES, CHECKPOINTS, SET_ASIDE)
_LEFT = re.compile(r"\..*\.tmp|\.model\.partial-.*")  # temporary files that a kill leaves


@contextmanager
def new_run(path: Path, overwrite: bool = False) -> Iterator[Journal]:
    """Make and lock the folder of a new run: ``path``, or ``<path>.partial-…`` beside an earlier run at ``path``.

    An error before the journal begins removes the folder; after a later error the run stays and can be resumed.

    Raises:
        RunError: ``path`` exists and ``overwrite`` is not given, ``path`` is not a run folder, another process is at
            work in it, or it cannot be written.
    """
    path = path.resolve()  # a link stays a link
    check_new_run(path, overwrite)
    made: list[Path] = []
    try:
        if path.exists() and not _unbegun(path):
            work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.partial-"))
            made = [work]
            work.chmod(0o777 & ~umask())
            flush(path.parent)
        else:
            work, made = path, make_folder(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from error
    try:
        with Journal.opened(work) as journal:
            try:
                if journal.records:
                    raise RunError(f"run folder {path} was made by another process meanwhile; expected a new path")
                yield journal
            finally:
                if work.is_dir() and not (work / JOURNAL).exists():  # a complete run may have been moved
                    for entry in list(work.iterdir()):
                        if entry.name in _BEGINNING or (_LEFT.fullmatch(entry.name) and entry.is_file()):
                            entry.unlink()
    finally:
        with suppress(OSError):  # a folder that is not empty stays
            for folder in reversed(made):
                folder.rmdir()


def check_new_run(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    strange = [path.name]
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        strange = [name for name in names if name not in _NAMES and not _LEFT.fullmatch(name)]
    if strange:
        raise RunError(f"{path} exists and is not a run folder (it has {strange[0]}); expected a new path")
    if _unbegun(path):
        return
    read_config(path)
    if overwrite:
        return
    if (path / JOURNAL).exists() and not (path / REPORT).exists():
        raise RunError(
            f"{path} holds an unfinished run; go on with: {resume_command(path)}; or give --overwrite to begin anew, "
            "which replaces it when done"
        )
    raise RunError(f"run folder {path} exists; expected a new path, or --overwrite to replace it when done")


def _unbegun(path: Path) -> bool:
    """Whether a run in ``path`` was stopped before the first step: nothing to lose, and nothing to resume."""
    names = [entry.name for entry in path.iterdir()]
    return not names or (LOCK in names and all(name in _BEGINNING or _LEFT.fullmatch(name) for name in names))


@contextmanager
def existing_run(path: Path) -> Iterator[Journal]:
    """Lock the folder of an earlier run.

    Raises:
        RunError: no run began in ``path``, its config or requests have changed since, another process is at work in
            the folder, or the folder cannot be written.
    """
    path = path.resolve()
    read_config(path)
    if not (path / JOURNAL).exists() and not (path / BATCHES).exists():
        raise RunError(f"{path} has no {JOURNAL}: the run was stopped before its first step; start it again")
    with Journal.opened(path) as journal:
        for file, expected in journal.records[0]["inputs"].items():
            found = file_sha256(path / file) if (path / file).is_file() else "none"
            if found != expected:
                raise RunError(
                    f"{path / file} is not the one that the run was made with: expected SHA-256 {expected[:16]}…, "
                    f"found {found[:16]}; put back a copy of it, or begin a new run"
                )
        yield journal


def is_finished(journal: Journal) -> bool:
    """Whether the run is complete and the result undamaged."""
    end = journal.last("finished")
    return end is not None and end["number"] == journal.batches and not journal.fault_of(end) and has_deltas(journal)


def has_deltas(journal: Journal) -> bool:
    """Whether ``deltas.safetensors`` is undamaged and belongs to the last batch."""
    found = journal.last("deltas")
    return found is not None and found["number"] == journal.batches and not (journal.fault or journal.fault_of(found))


def guard_of(journal: Journal, begun: str) -> str:
    """The current setting ``guard`` of a run: from the last change on a resume, else ``begun``."""
    found = journal.last("setting")
    return begun if found is None else str(found["guard"])


def place(folder: Path, name: str | None) -> Path:
    """The final path of a run that is to replace ``name``; a folder moved or copied since stays in place."""
    return folder.with_name(name) if name and folder.name.startswith(f"{name}.partial-") else folder


def replace_earlier(folder: Path, name: str | None) -> Path:
    """Move a complete run into the place of an earlier run ``name`` in the same folder; returns the new path.

    Raises: as `new_run`.
    """
    path = place(folder, name)
    if path == folder:
        return folder
    check_new_run(path, overwrite=True)
    if not path.exists():
        os.rename(folder, path)
        flush(path.parent)
        return path
    with locked(path):
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.old-"))
        os.rename(path, old / path.name)
        try:
            os.rename(folder, path)
        except BaseException:
            os.rename(old / path.name, path)
            raise
        flush(path.parent)
        shutil.rmtree(old)
    return path


def beside(path: Path) -> list[Path]:
    """Unfinished runs, stopped or still going on, that are to replace the run at ``path``."""
    found = path.parent.glob(f"{glob.escape(path.name)}.partial-*/{JOURNAL}")
    return sorted(journal.parent for journal in found)


def environment() -> dict[str, Any]:
    """Versions, machine and thread count, on which figures depend besides the settings."""
    import transformers

    return {
        "sphere_kernels": sphere_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def environment_changes(config: Mapping[str, Any]) -> list[str]:
    """Differences from the environment in which a run began, without the threads, which a resume can set."""
    now = environment()
    then = {name: config["environment"].get(name) for name in now if name != "threads"}
    return [f"{name} was {value}, is {now[name]}" for name, value in then.items() if value != now[name]]


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    with replacing(run / CONFIG) as path:
        text = yaml.safe_dump({"format": FORMAT, **config}, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def read_config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{run} is not a run folder: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise RunError(f"{path} was written by another version: expected format {FORMAT}, found {found!r}")
    for name, kind in (("model", str), ("settings", dict), ("environment", dict)):
        if not isinstance(config.get(name), kind):
            raise RunError(f"{path}: expected {name} to be a {kind.__name__}, found {config.get(name)!r}")
    return config


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, without the line of the schema.

    Raises:
        RunError: the file cannot be read, a line is not JSON (such as a torn last one), or the schema is later than
            `SCHEMA`.
    """
    path = run / METRICS
    events = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    events.append(json.loads(line))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise RunError(f"{path}, line {number}: not JSON ({error})") from error
    except OSError as error:
        raise RunError(f"{run} has no readable {METRICS}: {error}") from error
    if events and isinstance(events[0], dict) and events[0].get("event") == "schema":
        version = events.pop(0).get("version")
        if not isinstance(version, int) or version > SCHEMA:
            raise RunError(f"{path} has schema {version!r}, of a later version; expected at most {SCHEMA}")
    return events


def read_requests(run: Path) -> list[EditRequest]:
    return [EditRequest.from_dict(record.fields) for record in read_records(run / REQUESTS)]


def write_batch(journal: Journal, batch: BatchRecord) -> None:
    """Record a batch in the journal. The file holds ``random_state`` and, from the `LayerRecord` of each layer such as
    4, ``4.keys``, the update's factors ``4.left`` and ``4.right``, and ``4.gradients`` if there are any; a dense update
    is ``4.right`` alone.

    The events hold times, so they go into the journal's line: the same batch gives the same file."""
    tensors = {"random_state": batch.random_state}
    for layer, done in batch.layers.items():
        left, right = factors(done.update)
        tensors |= {f"{layer}.keys": done.keys, f"{layer}.right": right}
        if left is not None:
            tensors[f"{layer}.left"] = left
        if done.gradients is not None:
            tensors[f"{layer}.gradients"] = done.gradients
    facts = {
        "number": batch.number,
        "requests": list(batch.requests),
        "sha256": {str(layer): done.sha256 for layer, done in batch.layers.items()},
    }
    journal.add_batch(batch.number, tensors, facts, events=batch.events)


def read_batch(journal: Journal, record: Record) -> BatchRecord:
    path = journal.path(record)
    tensors, facts = load_file(path), read_facts(path)
    layers = {
        int(layer): LayerRecord(
            tensors[f"{layer}.keys"],
            of_factors(tensors.get(f"{layer}.left"), tensors[f"{layer}.right"]),
            sha256,
            tensors.get(f"{layer}.gradients"),
        )
        for layer, sha256 in facts["sha256"].items()
    }
    return BatchRecord(facts["number"], facts["requests"], layers, record["events"], tensors["random_state"])


@contextmanager
def new_model_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to save a model in, moved to ``path`` when complete; RunError unless ``path`` is new."""
    if path.exists():
        raise RunError(f"{path} exists; expected a new folder for the model")
    with new_folder(path) as work:
        yield work
