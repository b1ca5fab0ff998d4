"""One run: evaluate, edit, evaluate again, and write a run folder; can be resumed after any interruption."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sphere_edit.config import EditConfig
from sphere_edit.data.records import EditResult, ReplayError
from sphere_edit.data.requests import EditRequest, batches
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.editing.guard import GuardError
from sphere_edit.evaluation.harness import ability_scores, read_tasks, task_files
from sphere_edit.evaluation.judge import Endpoint, check_judge
from sphere_edit.events import SCHEMA, Event
from sphere_edit.experiments.snapshots import Snapshot, compare, curve, sample, take
from sphere_edit.files import file_sha256
from sphere_edit.model.text import text_path, token_windows
from sphere_edit.report.page import write_report
from sphere_edit.runs import run_folder
from sphere_edit.runs.deltas import switch, write_deltas
from sphere_edit.runs.journal import Journal, RunError, resume_command
from sphere_edit.runs.spec import RunOptions, check_counts

_RESULT = (run_folder.DELTAS, run_folder.REPORT, run_folder.MODEL)  # valid for the last batch only


OnEvent = Callable[[Event], None]
OnProgress = Callable[[str, int, int], None]


def run(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    config: EditConfig | str,
    options: RunOptions,
    on_event: OnEvent | None = None,
    on_progress: OnProgress | None = None,
    journal: Journal | None = None,
) -> EditResult:
    """Edit ``requests`` and write the run folder ``options.out`` (see `runs.run_folder`); the model stays edited.

    Args:
        journal: the folder's journal, if the caller has opened it by `run_folder.new_run`.

    Raises:
        ValueError and its subclasses: an argument does not fit, before a weight or ``out`` is touched; or, later, a
            file could not be written. The batches done by then are safe, and `resume` continues after them.
    """
    check_options(requests, options)
    opened = nullcontext(journal) if journal else run_folder.new_run(options.out, options.overwrite)
    with opened as journal:
        work = RunSession(model, tokenizer, requests, config, journal, on_event, on_progress)
        check_run(work.editor, requests, options.perplexity_text)
        run_folder.write_config(journal.folder, _record(work.editor, options, len(requests), journal.folder))
        run_folder.write_jsonl(journal.folder / run_folder.REQUESTS, [request.to_dict() for request in requests])
        journal.begin(
            inputs={name: file_sha256(journal.folder / name) for name in (run_folder.CONFIG, run_folder.REQUESTS)}
        )
        return work.go()


def check_options(requests: Sequence[EditRequest], options: RunOptions) -> None:
    """Raise ValueError if there are no requests, a count is too small, or a task of the harness is missing."""
    if not requests:
        raise ValueError(f"{options.data_name}: no requests; expected at least one edit")
    check_counts(options)
    if options.curve_answers and not options.curve_every:
        raise ValueError(f"curve_answers {options.curve_answers}: expected curve_every with it, got 0")
    check_judge(options.judge, options.judge_model, options.answers)
    if options.harness:
        read_tasks(options.harness, options.harness_data, options.harness_limit)
        return
    for name in ("harness_data", "harness_limit", "harness_ends"):
        if value := getattr(options, name):
            raise ValueError(f"{name} {value}: expected harness with it, the tasks to score")


def check_run(editor: SphereEditor, requests: Sequence[EditRequest], perplexity_text: str) -> None:
    """Check texts and requests as far as possible before a run; raises as `run` does, changes nothing."""
    if next(token_windows(editor.tokenizer, perplexity_text, 2, 2), None) is None:
        raise ValueError(f"perplexity_text {perplexity_text!r} has no text; expected at least two tokens")
    editor.check(requests)


def resume(
    model: Any,
    tokenizer: Any,
    folder: Path,
    on_event: OnEvent | None = None,
    on_progress: OnProgress | None = None,
    journal: Journal | None = None,
    guard: str | None = None,
) -> EditResult:
    """Resume the stopped run in ``folder``; the result is that of an uninterrupted run, bit for bit.

    Args:
        model, tokenizer: as before the run.
        journal: the folder's journal, if the caller has opened it by `run_folder.existing_run`.
        guard: new value of the setting ``guard``, for instance after a `GuardError`. No other setting may change; the
            journal records the new value. None keeps the old one.

    Raises:
        RunError: the model is another one, or this machine does not give the same bits; nothing is changed.
    """
    with nullcontext(journal) if journal else run_folder.existing_run(folder) as journal:
        work = RunSession.of_run(model, tokenizer, journal, on_event, on_progress, guard)
        if not run_folder.is_finished(journal):
            return work.go()
        switch(journal.folder, work.editor.structure, "after")
        events = run_folder.read_events(journal.folder)
        run_folder.replace_earlier(journal.folder, run_folder.read_config(journal.folder)["replaces"])
        return EditResult(list(work.requests), events=events)


def rollback(
    model: Any,
    tokenizer: Any,
    folder: Path,
    to_batch: int,
    on_progress: OnProgress | None = None,
    journal: Journal | None = None,
) -> Path | None:
    """Undo the newest batches of a run; the run is then as if stopped after batch ``to_batch``.

    Afterwards ``deltas.safetensors`` and the model belong to that batch, and `resume` continues from there.

    Args:
        model, tokenizer, journal: as for `resume`.
        to_batch: last batch to keep; 0 keeps none.

    Returns:
        The folder that now holds all later files; None if there were none.

    Raises:
        RunError: there is no such batch, or the run cannot be restored (see `resume`); nothing is changed.
    """
    with nullcontext(journal) if journal else run_folder.existing_run(folder) as journal:
        check_batch(journal, to_batch)
        journal.resume_hint = f"sphere-edit rollback {shlex.quote(str(journal.folder))} --to-batch {to_batch}"
        work = RunSession.of_run(model, tokenizer, journal, None, on_progress)
        if to_batch == journal.batches and run_folder.has_deltas(journal):
            switch(journal.folder, work.editor.structure, "after")
            return None
        with work.as_recorded():
            before = work.prepare()
            work.restore(to_batch)
            work.repair(before)
            aside = journal.go_back(to_batch, _RESULT)
            work.write_events(before)
            work.write_deltas()
        return aside


def check_batch(journal: Journal, number: int) -> None:
    if not 0 <= number <= journal.batches:
        fault = f" ({journal.fault})" if journal.fault else ""
        raise RunError(
            f"{journal.folder} has batches 1 to {journal.batches}{fault}; cannot roll back to batch {number}"
        )


class RunSession:
    """One process's work on a run: prepare, restore, edit, evaluate, and write the files."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        config: EditConfig | str,
        journal: Journal,
        on_event: OnEvent | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.requests, self.journal, self.folder = requests, journal, journal.folder
        self.on_event = on_event or (lambda event: None)
        self.progress = on_progress or (lambda what, done, total: None)
        self.start = time.perf_counter()
        self.editor = SphereEditor(
            model,
            tokenizer,
            config,
            on_progress=lambda what, *place: None if what == "batches" else self.progress(what, *place),
            on_batch=lambda batch: run_folder.write_batch(journal, batch),
            on_note=lambda text: journal.on_note(text),
        )
        self.prepared: list[Event] = []
        self.editor.on_event = self.prepared.append

    @classmethod
    def of_run(
        cls,
        model: Any,
        tokenizer: Any,
        journal: Journal,
        on_event: OnEvent | None,
        on_progress: OnProgress | None,
        guard: str | None = None,
    ) -> RunSession:
        record = run_folder.read_config(journal.folder)
        requests, settings = run_folder.read_requests(journal.folder), EditConfig.from_run(record["settings"])
        settings = settings.replace(guard=guard or run_folder.guard_of(journal, settings.guard))
        work = cls(model, tokenizer, requests, settings, journal, on_event, on_progress)
        check_run(work.editor, requests, record["perplexity_text"])
        device = str(work.editor.structure.device)
        if device != record["device"]:
            raise RunError(f"{journal.folder} was begun on device {record['device']!r}, the model is on {device!r}")
        return work

    def go(self) -> EditResult:
        with self.as_recorded():
            before = self.prepare()
            self.restore(self.journal.batches)
            self.repair(before)
            self.keep_guard()
            known = self.write_events(before)
            self.edit()
            self.write_deltas()
            after = self.snapshot("after")
            for event in (*after.events, *compare(self.scored, before, after)):
                self.emit(event)
            self.finish(known)
        events = run_folder.read_events(self.folder)
        run_folder.replace_earlier(self.folder, self.record["replaces"])
        return EditResult(list(self.requests), events=events)

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        """Use the run's recorded thread count and seed within the block; restore the caller's threads and random state
        after it."""
        self.record = run_folder.read_config(self.folder)
        self.scored = sample(self.requests, self.record.get("score_sample"), f"{self.editor.config.seed}/scores")
        recorded, threads = self.record["environment"]["threads"], torch.get_num_threads()
        device = self.editor.structure.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(self.editor.config.seed)
            if recorded != threads:
                self.journal.on_note(f"{recorded} threads, as the run began with, instead of {threads}")
                torch.set_num_threads(recorded)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def prepare(self) -> Snapshot:
        """Check that model and inputs have not changed since the run began; return the ``before`` snapshot."""
        for change in run_folder.environment_changes(self.record):
            self.journal.on_note(f"since the run began, {change}")
        self.editor.prepare()
        record = self.journal.last("before")
        if record is not None:
            self.check_unchanged(record["fingerprints"])
            fault = self.journal.fault_of(record)
            if fault is None:
                return Snapshot.read(self.journal.path(record))
            self.journal.on_note(f"{fault}; evaluating again")
        found = self.snapshot("before")
        events = self.prepared + found.events
        for event in events:
            self.on_event(event)
        return Snapshot(events, found.per_request, found.said)

    def check_unchanged(self, fingerprints: dict[str, str]) -> None:
        changes, found = run_folder.environment_changes(self.record), self.fingerprints()
        for name, expected in fingerprints.items():
            if found.get(name) != expected:
                reason = f" ({'; '.join(changes)})" if changes else ""
                raise RunError(
                    f"the {name} is not as it was when {self.folder} began{reason}: expected SHA-256 "
                    f"{expected[:16]}…, found {str(found.get(name))[:16]}…; it was made with model "
                    f"{self.record['model']!r}"
                )

    def repair(self, before: Snapshot) -> None:
        """Repair the journal and store the ``before`` snapshot: the first changes to the folder, after all checks."""
        self.journal.repair()
        record = self.journal.last("before")
        if record is not None and self.journal.fault_of(record) is None:
            return
        if (self.folder / run_folder.BEFORE).exists():
            self.journal.set_aside(run_folder.BEFORE)
        with self.journal.writing(run_folder.BEFORE):
            before.write(self.folder / run_folder.BEFORE)
        self.journal.add("before", run_folder.BEFORE, fingerprints=self.fingerprints())

    def keep_guard(self) -> None:
        """Record a changed setting ``guard`` in the journal; ``config.yaml`` stays."""
        guard, begun = self.editor.config.guard, EditConfig.from_run(self.record["settings"]).guard
        if guard != run_folder.guard_of(self.journal, begun):
            event = {"event": "setting", "batch": self.journal.batches, "name": "guard", "value": guard}
            self.journal.add("setting", events=[event], guard=guard)

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of every input: the editor's, the perplexity text, and the files of the harness's tasks."""
        text = text_path(self.record["perplexity_text"])
        tasks = self.record.get("harness") or ()
        files = task_files(tasks, self.record["harness_data"]) if tasks else {}
        asked = {f"task {name}": file_sha256(path) for name, path in files.items()}
        return self.editor.fingerprints() | {"perplexity text": file_sha256(text)} | asked

    def snapshot(self, when: str) -> Snapshot:
        text, tokens = self.record["perplexity_text"], self.record["perplexity_tokens_at_most"]
        url, answers = self.record.get("judge"), self.record.get("answers", False)
        judge = Endpoint(url, self.record["judge_model"], self.folder / run_folder.JUDGED) if url else None
        found = take(self.editor, self.scored, when, text, tokens, self.progress, answers, judge)
        found.events[0] |= self.ability()
        return found

    def ability(self) -> Event:
        """General ability of the model with the final weights; empty unless the run asks for a harness."""
        editor, tasks = self.editor, self.record.get("harness")
        if not tasks:
            return {}
        folder, limit = self.record["harness_data"], self.record["harness_limit"]
        with editor.finished():
            return {"ability": ability_scores(editor.model, editor.tokenizer, tasks, folder, limit)}

    def restore(self, to: int) -> None:
        """Restore model and editor after batch ``to``: load the newest checkpoint, then replay the later batches.

        Raises:
            RunError: a replayed batch does not give the recorded bits.
        """
        editor = self.editor
        checkpoint = self.journal.checkpoint(to)
        if checkpoint is not None:
            editor.load_state_dict(load_file(self.journal.path(checkpoint)))
        for record in self.journal.of_kind("batch")[editor.batches : to]:
            self.progress("batches done before", editor.batches, to)
            try:
                editor.replay(run_folder.read_batch(self.journal, record))
            except ReplayError as error:
                changes = "; ".join(run_folder.environment_changes(self.record))
                raise RunError(f"{self.journal.path(record)}: {error}{f' ({changes})' if changes else ''}") from error
        if to:
            self.progress("batches done before", to, to)

    def edit(self) -> None:
        parts, every = batches(self.requests, self.editor.config.batch_size), self.record["checkpoint_every"]
        done = self.journal.batches
        if done < len(parts):  # a rollback's files become outdated
            for name in (run_folder.DELTAS, run_folder.REPORT):
                (self.folder / name).unlink(missing_ok=True)
        self.editor.on_event = self.emit
        self.watch()
        self.tell(done, len(parts))
        for number, batch in enumerate(parts[done:], done + 1):
            with self.resume_hint():
                self.editor.edit(batch)
            self.tell(number, len(parts))
            self.watch()
            if number % every == 0:
                self.journal.add_checkpoint(self.editor.state_dict())

    def tell(self, batch: int, parts: int) -> None:
        self.progress("batches", batch, parts)
        self.progress("edits", self.editor.edits, len(self.requests))

    @contextmanager
    def resume_hint(self) -> Iterator[None]:
        """Add the number of safe batches and the resume command to a GuardError."""
        try:
            yield
        except GuardError as error:
            on = f"{resume_command(self.folder)} --guard skip (or warn)"
            error.args = (f"{error}; batches kept safe: {self.journal.batches}; go on with: {on}",)
            raise

    def watch(self) -> None:
        """Evaluate during the run if due, and record the curve event."""
        number, every = self.journal.batches, self.record.get("curve_every", 0)
        last = self.journal.last("curve")
        if not every or not number or (last is not None and last["number"] == number):
            return
        if number % every and self.editor.edits < len(self.requests):
            return
        text, tokens = self.record["perplexity_text"], self.record["perplexity_tokens_at_most"]
        counts = self.record["curve_sample"], self.record.get("curve_answers", 0)
        event = curve(self.editor, self.requests, counts[0], text, tokens, counts[1])
        event |= {} if self.record.get("harness_ends") else self.ability()
        self.journal.add("curve", events=[event])
        self.emit(event)

    def finish(self, known: Sequence[Event]) -> None:
        model, tokenizer = self.editor.model, self.editor.tokenizer
        if self.record["save_model"]:
            with self.journal.writing(run_folder.MODEL):
                for left in (self.folder / run_folder.MODEL, *self.folder.glob(f".{run_folder.MODEL}.partial-*")):
                    shutil.rmtree(left, ignore_errors=True)
                with run_folder.new_model_folder(self.folder / run_folder.MODEL) as path:
                    model.save_pretrained(path)
                    tokenizer.save_pretrained(path)
        earlier = sum(sum(event["seconds"].values()) for event in known if event["event"] == "batch")
        self.emit({"event": "finished", "seconds": earlier + time.perf_counter() - self.start})
        with self.journal.writing(run_folder.REPORT):
            write_report(self.folder)
        self.journal.add("finished", run_folder.METRICS)

    def emit(self, event: Event) -> None:
        with (
            self.journal.writing(run_folder.METRICS),
            (self.folder / run_folder.METRICS).open("a", encoding="utf-8") as log,
        ):
            log.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
        self.on_event(event)

    def write_events(self, before: Snapshot) -> list[Event]:
        """Rewrite ``metrics.jsonl`` from the journal, with all events up to the last batch; return the events."""
        later = [event for record in self.journal.records for event in record.get("events", [])]
        known = before.events + later
        with self.journal.writing(run_folder.METRICS):
            schema = {"event": "schema", "version": SCHEMA}
            run_folder.write_jsonl(self.folder / run_folder.METRICS, [schema, *known])
        return known

    def write_deltas(self) -> None:
        editor = self.editor
        editor.hand_over()
        names = {layer: editor.structure.edited[layer].name for layer in editor.config.layers}
        with self.journal.writing(run_folder.DELTAS):
            write_deltas(self.folder, names, editor.original_weights(), editor.weights(), self.record["model"])
        self.journal.add("deltas", run_folder.DELTAS)


def _record(editor: SphereEditor, options: RunOptions, edits: int, folder: Path) -> dict[str, Any]:
    target = options.out.resolve().name
    return {
        "model": options.model_name,
        "data": options.data_name,
        "edits": edits,
        "dtype": str(editor.weights()[editor.config.layers[0]].dtype),
        "device": str(editor.structure.device),
        **options.recorded(),
        "replaces": None if folder.name == target else target,
        "given": options.given,
        "settings": editor.config.to_dict(),
        "environment": run_folder.environment(),
    }
