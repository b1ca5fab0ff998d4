"""Files written whole or not at all, and hashes of files and tensors.

"Written" means on the disk: contents are flushed before a file gets its name, and the folder is flushed after, so that
neither a kill nor a power cut leaves half a file under a name or a name that comes back as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FACTS = "facts"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, flushed and renamed onto it at the end; an error leaves ``path`` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~umask())
        flush(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """`os.write` may write a part only; this writes the rest, too."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def move(path: Path, folder: Path) -> None:
    """Give ``path`` the same name in ``folder``, on the disk."""
    os.replace(path, folder / path.name)
    flush(folder)
    flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed onto it at the end; nothing is left on an error.

    Raises:
        OSError: ``path`` exists by then and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
    try:
        yield work
        work.chmod(0o777 & ~umask())
        for inside in (*work.rglob("*"), work):
            flush(inside)
        os.rename(work, path)
        flush(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and its parents, on the disk; returns those that were not there, the outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)
    return missing


def check_writable(folder: Path) -> None:
    """Try it: permissions do not tell of a read-only file system, nor does root heed them.

    Raises:
        OSError: no file can be made in ``folder``.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file. The facts, anything that JSON knows, are one entry of its metadata: of several, the
    library shuffles the order, and the same content would not be the same bytes.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, {_FACTS: json.dumps(facts, allow_nan=False)})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file of `write_tensors`.

    Raises:
        OSError, SafetensorError: it cannot be read, or is no such file.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        facts = json.loads(metadata[_FACTS])
    except (KeyError, json.JSONDecodeError) as error:
        raise SafetensorError(f"no facts in its metadata ({error!r})") from error
    if not isinstance(facts, dict):
        raise SafetensorError(f"expected facts by name in its metadata, found {type(facts).__name__}")
    return facts


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
