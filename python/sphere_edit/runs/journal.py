"""The journal of a run: a kill, a full disk or a flipped bit loses at most the steps from there on.

    journal.jsonl                   one line per step done, appended, never rewritten
    batches/000001.safetensors      the record of batch 1
    checkpoints/000010.safetensors  the whole state after batch 10; the newest two are kept
    set-aside/1/                    steps found torn or altered, or rolled back, with all later ones
    lock                            names the process at work here, which holds it

A step's file is written first, then its line; the step counts once its line is on the disk. A line ends in ``chain``,
the SHA-256 of the previous line's ``chain`` and of the line itself, and names size and SHA-256 of its file. So no line
or file can change, vanish or change places unnoticed. The steps before the first one that fails this test hold; the
rest is moved to ``set-aside/``.

In this module a batch is named tensors and facts; the module knows nothing about models.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from sphere_edit.files import check_writable, file_sha256, flush, make_folder, move, replacing, write_all, write_tensors

FORMAT = 2
JOURNAL, BATCHES, CHECKPOINTS, SET_ASIDE, LOCK = "journal.jsonl", "batches", "checkpoints", "set-aside", "lock"
_CHAIN = b', "chain": "'
_CHECKPOINTS_KEPT = 2

Record = dict[str, Any]


class RunError(ValueError):
    """A run folder cannot be used; the message names the folder, the expectation and the finding."""


class InUse(RunError):
    """Another process is at work in the run folder."""


def resume_command(folder: Path) -> str:
    return f"sphere-edit run --resume {shlex.quote(str(folder))}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; the kernel releases the lock when the process ends, in whatever way.

    Raises:
        InUse: another process holds the lock; the message names the process.
        RunError: nothing can be written in ``folder``.
    """
    path = folder / LOCK
    try:
        check_writable(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written to ({error.strerror})") from error
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 300).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise InUse(f"{folder} is in use by {holder}; expected one process at a time") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # the last holder has removed this file meanwhile
    try:
        with suppress(OSError):  # a full disk must not prevent a rollback
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


class Journal:
    """The valid steps of the run in ``folder``. The constructor reads and verifies, and changes nothing.

    A record is a dictionary with ``kind``, ``number`` (batches done by then) and, for a step with a file, ``file``,
    ``size`` and ``sha256``. The journal itself knows the kinds ``run`` (the first), ``batch`` and ``checkpoint``.

    Attributes:
        records: the valid steps, in order.
        fault: the fault of the first step that is not valid, or None.
        resume_hint: the command to resume the run, for error messages.
        on_note: called with a message for the user about each fault and its remedy.

    Raises:
        RunError: the first line is damaged, or there are batches but no journal. No step remains to go back to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self.fault: str | None = None
        self.on_note: Callable[[str], None] = warnings.warn
        self.resume_hint = resume_command(folder)
        self._marks: list[tuple[int, bytes]] = [(0, b"")]  # end of each record's line, and its chain
        self._file: int | None = None
        self._read()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Journal]:
        """A journal under the lock of the folder."""
        with locked(folder):
            journal = cls(folder)
            try:
                yield journal
            finally:
                journal._close()

    @property
    def batches(self) -> int:
        """Number of the last batch that is safe on the disk."""
        return self.records[-1]["number"] if self.records else 0

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def last(self, kind: str) -> Record | None:
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    def path(self, record: Record) -> Path:
        return self.folder / record["file"]

    def begin(self, **facts: Any) -> None:
        """Write the first line, whole or not at all."""
        assert not self.records
        record = {"kind": "run", "number": 0, "format": FORMAT, **facts}
        line, chain = _line(record, b"")
        with self.writing(JOURNAL), replacing(self.folder / JOURNAL) as path:
            path.write_bytes(line)
        self._hold(record, len(line), chain)

    def add(self, kind: str, file: str | None = None, **facts: Any) -> None:
        """Append a step's line; the step's ``file``, if any, must be complete. An error leaves no line behind."""
        record: Record = {"kind": kind, "number": self.batches, **facts}
        if file is not None:
            path = self.folder / file
            with self.writing(file):
                flush(path)
                record |= {"file": file, "size": path.stat().st_size, "sha256": file_sha256(path)}
        with self.writing(JOURNAL):
            self._append(record)

    def add_batch(self, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], **more: Any) -> None:
        """Record batch ``number``, the next one: ``tensors`` and ``facts`` in a file, ``more`` in the line."""
        assert number == self.batches + 1
        file = f"{BATCHES}/{number:06d}.safetensors"
        with self.writing(file):
            make_folder(self.folder / BATCHES)
            write_tensors(self.folder / file, tensors, facts)
        try:
            self.add("batch", file, **{**more, "number": number})
        except BaseException:
            if self.batches < number:
                with suppress(OSError):
                    (self.folder / file).unlink()
            raise

    def add_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the state after the last batch as a checkpoint; delete all but the newest two checkpoints."""
        file = f"{CHECKPOINTS}/{self.batches:06d}.safetensors"
        with self.writing(file):
            make_folder(self.folder / CHECKPOINTS)
            write_tensors(self.folder / file, tensors, {"batches": self.batches})
        self.add("checkpoint", file)
        for old in self.of_kind("checkpoint")[:-_CHECKPOINTS_KEPT]:
            self.path(old).unlink(missing_ok=True)

    def checkpoint(self, number: int) -> Record | None:
        """The newest undamaged checkpoint of at most ``number`` batches, or None."""
        for record in reversed(self.of_kind("checkpoint")):
            if record["number"] <= number and self.path(record).exists():
                fault = self.fault_of(record)
                if fault is None:
                    return record
                self.on_note(f"{fault}; passed over")
        return None

    def fault_of(self, record: Record) -> str | None:
        """The fault of a record's file, in words; None for an undamaged file."""
        path = self.path(record)
        try:
            size = path.stat().st_size
            if size != record["size"]:
                return f"{path} is torn: expected {record['size']} bytes, found {size}"
            found = file_sha256(path)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found != record["sha256"]:
            return f"{path} is altered: expected SHA-256 {record['sha256'][:16]}…, found {found[:16]}…"
        return None

    def repair(self) -> None:
        """Set aside the first invalid step and all later files; delete temporary files that a kill left."""
        aside = self._cut(len(self.records))
        if self.fault is not None:
            later = "" if aside is None else f", what came later is in {aside}"
            self.on_note(f"{self.fault}; going back to batch {self.batches}{later}")
            self.fault = None
        for left in self.folder.rglob(".*.tmp"):
            if left.is_file():
                left.unlink()

    def go_back(self, number: int, also: Iterable[str] = ()) -> Path | None:
        """Set aside all steps after batch ``number`` and the files ``also``, now outdated; returns the new folder."""
        return self._cut(sum(record["number"] <= number for record in self.records), also)

    def set_aside(self, *files: str) -> Path:
        """Move files, named from the run folder, into a new folder under ``set-aside/``; returns that folder."""
        taken = [int(path.name) for path in (self.folder / SET_ASIDE).glob("[0-9]*")]
        aside = self.folder / SET_ASIDE / str(max(taken, default=0) + 1)
        with self.writing(SET_ASIDE):
            make_folder(aside)
            self._move(files, aside)
        return aside

    @contextmanager
    def writing(self, file: str) -> Iterator[None]:
        """Turn an OSError while ``file`` is written into a RunError with the safe batches and the resume command."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.folder / file} could not be written ({error.strerror or error}); batches kept safe: "
                f"{self.batches}; go on with: {self.resume_hint}"
            ) from error

    def _read(self) -> None:
        path = self.folder / JOURNAL
        try:
            *lines, _torn = path.read_bytes().split(b"\n")  # a line torn by a kill has no end of line
        except FileNotFoundError:
            if any((self.folder / BATCHES).glob("[!.]*")):
                raise RunError(f"{path} is missing, though there are batches; put back a copy of it") from None
            return
        for number, line in enumerate(lines, 1):
            body, mark, _ = line.rpartition(_CHAIN)
            chain = _sha256(self._marks[-1][1] + body)
            if not mark or line != body + mark + chain + b'"}':
                self.fault = f"{path}, line {number} is torn or altered: its SHA-256 does not match"
                break
            record = json.loads(line)
            if number == 1 and record.get("format") != FORMAT:
                raise RunError(f"{path} was written by another version: expected format {FORMAT}")
            if record["kind"] == "batch" and (fault := self.fault_of(record)) is not None:
                self.fault = fault
                break
            del record["chain"]
            self._hold(record, len(line) + 1, chain)
        if not self.records:
            raise RunError(
                f"{self.fault or f'{path} has no whole line'}; all else is judged by it, so there is nothing to go "
                "back to: put back a copy of it, or begin a new run"
            )

    def _hold(self, record: Record, length: int, chain: bytes) -> None:
        self.records.append(record)
        self._marks.append((self._marks[-1][0] + length, chain))

    def _forget(self, count: int) -> None:
        del self.records[count:], self._marks[count + 1 :]

    def _append(self, record: Record) -> None:
        count, (end, previous) = len(self.records), self._marks[-1]
        if self._file is None:
            self._file = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_APPEND)
        if os.fstat(self._file).st_size != end:
            raise OSError(errno.EIO, "its end is not the end that was read or written last")
        line, chain = _line(record, previous)
        try:
            write_all(self._file, line)
            os.fsync(self._file)
            self._hold(record, len(line), chain)
        except BaseException:
            self._forget(count)
            with suppress(OSError):  # else the torn end stays, and the next process repairs it
                os.ftruncate(self._file, end)
                os.fsync(self._file)
            raise

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _move(self, files: Iterable[str], aside: Path) -> None:
        for file in files:
            make_folder((aside / file).parent)
            move(self.folder / file, (aside / file).parent)

    def _cut(self, count: int, also: Iterable[str] = ()) -> Path | None:
        """Keep ``count`` records. After a kill at any point, the same call does the rest.

        Files that are valid only with the last lines (``also``) go first, so that they never remain without these
        lines. Then the lines go, which decide; then the files that no line names any more."""
        if not self.records:
            return None
        path, end = self.folder / JOURNAL, self._marks[count][0]
        rest = path.read_bytes()[end:]
        named = {record.get("file") for record in self.records[:count]}
        inside = [file for name in (BATCHES, CHECKPOINTS) for file in sorted((self.folder / name).glob("[!.]*"))]
        strays = [name for file in inside if (name := file.relative_to(self.folder).as_posix()) not in named]
        derived = [file for file in also if (self.folder / file).exists()]
        lines = b"\n" in rest  # else at most a torn line, which holds nothing
        aside = self.set_aside(*derived) if derived or strays or lines else None
        with self.writing(SET_ASIDE):
            if aside is not None and lines:
                with replacing(aside / JOURNAL) as copy:
                    copy.write_bytes(rest)
            if rest:
                os.truncate(path, end)
                flush(path)
            self._forget(count)
            if aside is not None:
                self._move(strays, aside)
        return aside


def _line(record: Record, previous: bytes) -> tuple[bytes, bytes]:
    """(line, chain) of a record after the chain ``previous``."""
    body = json.dumps(record, allow_nan=False).encode()[:-1]
    chain = _sha256(previous + body)
    return body + _CHAIN + chain + b'"}\n', chain


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
