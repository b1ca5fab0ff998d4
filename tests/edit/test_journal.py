"""The journal under kills, power cuts, full disks, flipped bits and torn files: what was kept stays, or is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sphere_edit import files
from sphere_edit.files import read_facts
from sphere_edit.runs.journal import BATCHES, CHECKPOINTS, JOURNAL, LOCK, SET_ASIDE, Journal, RunError

_COUNT = 5


def _tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"left": torch.randn(3, 2, generator=generator), "random_state": torch.full((9,), number, dtype=torch.uint8)}


def _facts(number: int) -> dict:
    return {"number": number, "requests": [f"{number}é", '", "chain": "']}


def _go_on(folder: Path, reached=lambda number: None, back: bool = True) -> None:
    """What a run does: five batches, a checkpoint after each second, and once a rollback from four to three."""
    with Journal.opened(folder) as journal:
        journal.on_note = lambda text: None
        if not journal.records:
            journal.begin(inputs={})
        journal.repair()
        if journal.last("before") is None:
            with files.replacing(folder / "before.json") as path:
                path.write_text("{}")
            journal.add("before", "before.json", fingerprints={"model": "x"})
        while journal.batches < _COUNT:
            number = journal.batches + 1
            journal.add_batch(number, _tensors(number), _facts(number), events=[{"event": "batch", "seconds": 0.5}])
            reached(number)
            if number % 2 == 0:
                journal.add_checkpoint({"state": torch.full((4,), float(number))})
            if number == 4 and back and not (folder / "result").exists():
                (folder / "result").write_text("of four")
                reached(3)
                journal.go_back(3, ["result"])
                (folder / "result").write_text("of three")
        journal.add("finished")


def _check(folder: Path, at_least: int = 0) -> int:
    """Everything that is kept is a prefix, bit for bit; the number of batches."""
    with Journal.opened(folder) as journal:
        kept = journal.of_kind("batch")
        assert [record["number"] for record in kept] == list(range(1, len(kept) + 1))
        assert journal.batches == len(kept) >= at_least
        for record in kept:
            found, expected = load_file(journal.path(record)), _tensors(record["number"])
            assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
            assert read_facts(journal.path(record)) == _facts(record["number"])
            assert record["events"] == [{"event": "batch", "seconds": 0.5}]
        newest = journal.checkpoint(journal.batches)
        if newest is not None:
            assert load_file(journal.path(newest))["state"].eq(newest["number"]).all()
        return len(kept)


@pytest.fixture
def no_waiting(monkeypatch):
    """The kernel outlives its processes: after a kill, it does not matter what has reached the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("whole")
    _go_on(folder, back=False)
    assert _check(folder) == _COUNT
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _lines(folder: Path) -> list[bytes]:
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True)


def _batches_before(lines: list[bytes], line: int) -> int:
    return max((json.loads(text)["number"] for text in lines[:line]), default=0)


def _repaired(folder: Path) -> tuple[Journal, list[str]]:
    notes: list[str] = []
    with Journal.opened(folder) as journal:
        journal.on_note = notes.append
        journal.repair()
    return journal, notes


_CALLS = ("write", "fsync", "replace", "rename", "truncate", "ftruncate", "mkdir", "unlink", "pwrite")


def _killed_at(folder: Path, point: int, half: bool) -> tuple[bool, int]:
    """A child does the run and dies before its ``point``-th call that changes the disk, or ``half`` through its
    ``point``-th write.

    Returns:
        (whether it came to an end before, the batches that it was told were safe)."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            count, real, write = 0, {name: getattr(os, name) for name in _CALLS}, os.write

            def dying(name):
                def call(*args, **named):
                    nonlocal count
                    count += name == "write" or not half
                    if count == point:
                        if half:
                            write(args[0], bytes(args[1])[: len(args[1]) // 2])
                        os._exit(9)
                    return real[name](*args, **named)

                return call

            for name in _CALLS:
                setattr(os, name, dying(name))
            _go_on(folder, lambda number: write(tell, bytes([number])))
            os._exit(0)
        os._exit(1)
    os.close(tell)
    said = b""
    while part := os.read(told, 99):
        said += part
    os.close(told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0, said[-1] if said else 0


@pytest.mark.parametrize("half", [False, True], ids=["before", "half"])
def test_a_kill_at_every_call_loses_nothing_that_was_safe(half, whole, tmp_path, no_waiting):
    """Killed once at each point, then gone on with: in the end the same files."""
    for point in range(1, 10_000):
        run = tmp_path / f"run{point}"
        run.mkdir()
        ended, safe = _killed_at(run, point, half)
        if (run / JOURNAL).exists():
            assert _check(run) in (safe, safe + 1, 4), point  # killed before it could say so; or before the rollback
        assert _check(run, safe) >= safe
        _go_on(run)
        expected, found = _contents(whole / BATCHES), _contents(run / BATCHES)
        assert found == expected, point
        assert set(_contents(run / CHECKPOINTS)) <= {"000002.safetensors", "000004.safetensors"}, point
        assert not list(run.rglob(".*.tmp"))
        shutil.rmtree(run)
        if ended:
            break
    assert point > (7 if half else 100)


def test_killed_again_and_again(whole, tmp_path, no_waiting):
    """Twenty kills, each a little further into what is left."""
    run = tmp_path / "run"
    run.mkdir()
    safe = 0
    for point in range(5, 105, 5):
        ended, told = _killed_at(run, point, bool(point % 2))
        safe = max(told, min(safe, 3))
        _check(run, safe)
        if ended:
            break
    _go_on(run)
    assert _contents(run / BATCHES) == _contents(whole / BATCHES)


class _PowerCuts:
    """What is on the disk for certain, by the most careless file system that keeps its promises: the contents of a
    file as of its last fsync, and the names in a folder as of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.contents, self.names, self.pins = folder, {}, {}, []
        self.checks = 0
        self._keep_names(folder)
        real = os.fsync

        def fsync(handle):
            real(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_dir():
                self._keep_names(path)
            else:
                self.pins.append(os.dup(handle))  # so that no other file gets its inode
                self.contents[os.fstat(handle).st_ino] = path.read_bytes()
            self.check()

        patch.setattr(os, "fsync", fsync)
        self.safe = 0

    def _keep_names(self, folder: Path) -> None:
        self.names[folder.stat().st_ino] = {e.name: (e.inode(), e.is_dir()) for e in os.scandir(folder)}

    def after(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, (inside, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                self.after(inside, target / name)
            else:
                (target / name).write_bytes(self.contents.get(inside, b""))

    def check(self) -> None:
        copy = self.folder.with_name("after the cut")
        self.after(self.folder.stat().st_ino, copy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            assert _check(copy, self.safe) >= self.safe
            _repaired(copy)
            assert _check(copy) >= self.safe
        shutil.rmtree(copy)
        self.checks += 1


def test_a_power_cut_after_every_flush_loses_nothing_that_was_safe(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    cuts = _PowerCuts(run, monkeypatch)

    def reached(number):
        cuts.safe = number
        cuts.check()

    _go_on(run, reached)
    assert cuts.checks > 40
    for pin in cuts.pins:
        os.close(pin)


def test_a_flipped_bit_anywhere_in_the_journal_is_named(folder):
    blob, lines = (folder / JOURNAL).read_bytes(), _lines(folder)
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    before = _contents(folder / BATCHES)
    for place in range(0, len(blob) - 1, 3):
        line = next(i for i, end in enumerate(ends) if place < end)
        changed = bytearray(blob)
        changed[place] ^= 1 << place % 8
        (folder / JOURNAL).write_bytes(bytes(changed))
        if line == 0:
            with pytest.raises(RunError, match=r"journal.jsonl, line 1 .*torn or altered"):
                Journal(folder)
            continue
        journal = Journal(folder)
        assert journal.batches == _batches_before(lines, line)
        assert f"{folder / JOURNAL}, line {line + 1} is torn or altered" in journal.fault
        assert _contents(folder / BATCHES) == before  # looking changes nothing


@pytest.mark.parametrize("number", range(1, _COUNT + 1))
def test_a_flipped_bit_anywhere_in_a_batch_is_named(number, folder):
    path = folder / BATCHES / f"{number:06d}.safetensors"
    blob = path.read_bytes()
    for place in range(0, len(blob), 5):
        changed = bytearray(blob)
        changed[place] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        journal = Journal(folder)
        assert journal.batches == number - 1
        assert str(path) in journal.fault and "altered: expected SHA-256" in journal.fault
    for size in range(0, len(blob), 7):
        path.write_bytes(blob[:size])
        journal = Journal(folder)
        assert journal.batches == number - 1
        assert journal.fault == f"{path} is torn: expected {len(blob)} bytes, found {size}"
    path.unlink()
    assert f"{path} cannot be read (No such file" in Journal(folder).fault


def test_what_is_damaged_and_what_came_later_is_set_aside(folder, whole):
    path = folder / BATCHES / "000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before, lines = _contents(folder), _lines(folder)
    _, (note,) = _repaired(folder)
    assert str(path) in note and "going back to batch 2" in note and str(folder / SET_ASIDE / "1") in note
    assert _check(folder) == 2
    aside = _contents(folder / SET_ASIDE / "1")
    for name in (f"{BATCHES}/000003.safetensors", f"{BATCHES}/000005.safetensors", f"{CHECKPOINTS}/000004.safetensors"):
        assert aside[name] == before[name]
    kept = _lines(folder)
    assert aside[JOURNAL] == b"".join(lines[len(kept) :]) and kept == lines[: len(kept)]
    assert _repaired(folder)[1] == []
    _go_on(folder, back=False)
    assert _contents(folder / BATCHES) == _contents(whole / BATCHES)
    path.write_bytes(b"")
    _repaired(folder)
    assert set(_contents(folder / SET_ASIDE / "2")) >= {f"{BATCHES}/000003.safetensors"}
    assert _contents(folder / SET_ASIDE / "1") == aside


def test_a_journal_cut_at_every_length(folder, no_waiting):
    """As a kill leaves it: what has no end of line is not there, and batches that have no line are set aside."""
    blob, pristine = (folder / JOURNAL).read_bytes(), _contents(folder)
    lines = _lines(folder)
    for length in range(0, len(blob), 11):
        for name in (BATCHES, CHECKPOINTS, SET_ASIDE):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name, data in pristine.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        (folder / JOURNAL).write_bytes(blob[:length])
        whole = blob[:length].count(b"\n")
        if whole == 0:
            with pytest.raises(RunError, match="no whole line"):
                Journal(folder)
            continue
        journal, notes = _repaired(folder)
        assert journal.batches == _batches_before(lines, whole) and notes == []
        assert _check(folder) == journal.batches
        inside = {p.name for p in (folder / BATCHES).iterdir()}
        aside = {p.name for p in folder.glob(f"{SET_ASIDE}/*/{BATCHES}/*")}
        assert inside | aside == {f"{n:06d}.safetensors" for n in range(1, _COUNT + 1)}
        assert len(inside) == journal.batches and (folder / JOURNAL).read_bytes() == b"".join(lines[:whole])


def test_lines_out_of_order_missing_or_of_another_journal(folder, whole, tmp_path):
    lines = _lines(folder)
    other = tmp_path / "other"
    other.mkdir()
    with Journal.opened(other) as journal:
        journal.begin(inputs={"config.yaml": "other"})
        journal.add("before")
    for changed, line in (
        ([*lines[:3], lines[4], lines[3], *lines[5:]], 4),
        ([*lines[:2], *lines[3:]], 3),
        ([*lines[:3], lines[2], *lines[3:]], 4),
        ([lines[0], _lines(other)[1], *lines[2:]], 2),
        ([*lines[:4], b"\n", *lines[4:]], 5),
        ([*lines[:4], b'{"kind": "batch", "number": 9}\n', *lines[4:]], 5),
    ):
        (folder / JOURNAL).write_bytes(b"".join(changed))
        assert f"line {line} is torn or altered" in Journal(folder).fault


def test_a_damaged_checkpoint_is_named_and_passed_over(folder):
    newest = folder / CHECKPOINTS / "000004.safetensors"
    blob = bytearray(newest.read_bytes())
    blob[-1] ^= 4
    newest.write_bytes(bytes(blob))
    notes: list[str] = []
    with Journal.opened(folder) as journal:
        journal.on_note = notes.append
        assert journal.fault is None and journal.batches == _COUNT
        assert journal.checkpoint(5)["number"] == 2
        assert len(notes) == 1 and str(newest) in notes[0] and "passed over" in notes[0]
        assert journal.checkpoint(1) is None
        (folder / CHECKPOINTS / "000002.safetensors").write_bytes(b"")
        assert journal.checkpoint(5) is None and len(notes) == 3


def test_no_journal_or_another_version(folder):
    (folder / JOURNAL).rename(folder / "kept")
    with pytest.raises(RunError, match="journal.jsonl is missing, though there are batches"):
        Journal(folder)
    shutil.rmtree(folder / BATCHES)
    assert Journal(folder).records == []
    with Journal.opened(folder) as journal, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sphere_edit.runs.journal.FORMAT", 99)
        journal.begin()
    with pytest.raises(RunError, match="another version"):
        Journal(folder)


def test_going_back_takes_what_no_longer_holds(folder):
    (folder / "deltas").write_text("of five")
    with Journal.opened(folder) as journal:
        aside = journal.go_back(4, ["deltas", "absent"])
        assert journal.batches == 4 and journal.last("finished") is None
        assert journal.checkpoint(4)["number"] == 4
        assert set(_contents(aside)) == {"deltas", JOURNAL, f"{BATCHES}/000005.safetensors"}
        assert journal.go_back(4) is None
        journal.go_back(0)
        assert journal.batches == 0 and journal.last("before") is not None
    _go_on(folder, back=False)
    assert _check(folder) == _COUNT


_HOLDER = """
import sys, time
from pathlib import Path
from sphere_edit.runs.journal import Journal
with Journal.opened(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(folder):
    before = _contents(folder)
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = f"in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(RunError, match=said), Journal.opened(folder):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with Journal.opened(folder) as journal:
        assert journal.batches == _COUNT
        with pytest.raises(RunError, match=f"process {os.getpid()}"), Journal.opened(folder):  # nor twice in one
            pass
    after = _contents(folder)
    assert {k: v for k, v in after.items() if k != LOCK} == {k: v for k, v in before.items() if k != LOCK}


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkstemp", "save_file"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_cannot_be_written_is_said_and_nothing_is_lost(call, number, tmp_path, monkeypatch, whole):
    """Each call fails from its third time on, then never again."""
    run = tmp_path / "run"
    run.mkdir()
    place = {"mkstemp": files.tempfile, "save_file": files}.get(call, os)
    real, count = getattr(place, call), 0

    def failing(*args, **named):
        nonlocal count
        count += 1
        if count >= 5:
            if call == "write":
                real(args[0], bytes(args[1])[:7])
            raise OSError(number, os.strerror(number))
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, call, failing)
        with pytest.raises(RunError) as caught:
            _go_on(run, back=False)
    said = str(caught.value)
    assert os.strerror(number) in said and said.endswith(f"go on with: sphere-edit run --resume {run}")
    safe = _check(run)
    assert f"batches kept safe: {safe}" in said
    _go_on(run, back=False)
    assert _contents(run / BATCHES) == _contents(whole / BATCHES)


def test_one_journal_goes_on_after_a_full_disk(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    real = os.write
    with Journal.opened(run) as journal:
        journal.begin(inputs={})
        journal.add_batch(1, _tensors(1), _facts(1), events=[{"event": "batch", "seconds": 0.5}])
        with monkeypatch.context() as patch:

            def full(handle, data):
                if len(data) < 50:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(handle, bytes(data)[: len(data) // 2])  # a part at a time

            patch.setattr(os, "write", full)
            with pytest.raises(RunError, match="journal.jsonl could not be written .No space left.*kept safe: 1;"):
                journal.add_batch(2, _tensors(2), _facts(2), events=[{"event": "batch", "seconds": 0.5}])
        assert journal.batches == 1 and [p.name for p in (run / BATCHES).iterdir()] == ["000001.safetensors"]
        journal.add_batch(2, _tensors(2), _facts(2), events=[{"event": "batch", "seconds": 0.5}])
    assert _check(run) == 2


_LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_journal
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    test_journal._go_on(Path(sys.argv[1]), back=False)
except ValueError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [350, 700, 1500, 2300])
def test_a_real_limit_on_the_size_of_files(limit, tmp_path, whole):
    """The smallest is less than a batch, the others end in the journal."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-c", _LIMITED, str(run), str(Path(__file__).parent), str(limit)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 1 and "Traceback" not in child.stderr
    assert "could not be written (File too large)" in child.stderr and "--resume" in child.stderr
    assert f"batches kept safe: {_check(run)};" in child.stderr
    _go_on(run, back=False)
    assert _contents(run / BATCHES) == _contents(whole / BATCHES)


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch):
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):  # root may
            monkeypatch.setattr(
                files.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only"))
            )
        with pytest.raises(RunError, match="cannot be written"), Journal.opened(folder):
            pass
    finally:
        folder.chmod(0o755)


def test_names_that_a_shell_would_split(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    with pytest.raises(RunError, match="--resume '.*my run'"), Journal.opened(run) as journal, journal.writing("x"):
        raise OSError(errno.ENOSPC, "full")
