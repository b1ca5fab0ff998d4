"""Files written whole or not at all, and hashes of files and tensors.

"Written" means on disk: the contents are flushed before the file gets its name, and the folder is flushed after. A kill
or a power cut leaves no half-written file under a name and undoes no finished write.
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
    """Yield a temporary path, then flush its file and rename it to ``path``; an error leaves ``path`` unchanged."""
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
    """Wait until a file's contents, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all of ``data``; a single `os.write` may write only part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def move(path: Path, folder: Path) -> None:
    """Move ``path`` into ``folder`` under the same name, on disk."""
    os.replace(path, folder / path.name)
    flush(folder)
    flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder and rename it to ``path`` at the end; an error leaves nothing behind.

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
    """Make a folder and its parents, on disk; return the folders made, the outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)
    return missing


def check_writable(folder: Path) -> None:
    """Make a temporary file: permissions do not show a read-only file system, and do not bind root.

    Raises:
        OSError: no file can be made in ``folder``.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def umask() -> int:
    """The process's umask; it can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file with facts, any JSON values, in its metadata.

    All facts are one metadata entry: the library shuffles several, and the same content would give different bytes.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
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
    """The facts in a file that `write_tensors` wrote.

    Raises:
        OSError, SafetensorError: the file cannot be read, or has no facts.
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
