"""The folder that a run leaves behind, and its exact undoing.

    config.yaml          model, data, settings, versions
    requests.jsonl       the edits in order
    metrics.jsonl        one event a line, as it happened
    deltas.safetensors   per edited weight: the projected updates as factors, and the bits that the run changed
    report.html          the page made from the above
    model/               the edited model, where asked for

Adding low-rank factors again could round differently on another machine, and subtracting them never gives the old bits
back. So the file also holds, per weight, the exclusive or of the bits before and after: applying it to either gives
the other, everywhere, and SHA-256 sums say which of the two a model has.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import sphere_kernels
from sphere_edit.editor import EditResult, SphereEditor
from sphere_edit.files import new_folder, replacing, tensor_sha256, umask
from sphere_edit.structure import ModelStructure

FORMAT = 1
CONFIG, REQUESTS, METRICS, DELTAS, REPORT, MODEL = (
    "config.yaml",
    "requests.jsonl",
    "metrics.jsonl",
    "deltas.safetensors",
    "report.html",
    "model",
)
_NAMES = (CONFIG, REQUESTS, METRICS, DELTAS, REPORT, MODEL)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RunError(ValueError):
    """A run folder that cannot be used; the message names the folder, what was expected and what was found."""


@contextmanager
def new_run(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``path``, moved there once everything in it is complete.

    An error or interrupt leaves ``path`` as it was, and what there is so far in a folder ``<path>.partial-…``.

    Raises:
        RunError: ``path`` exists and ``overwrite`` is not given, or it is something other than a run folder.
    """
    path = path.resolve()  # a link stays a link
    check_new_run(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.partial-"))
    yield work
    check_new_run(path, overwrite)  # another process may have been here meanwhile
    work.chmod(0o777 & ~umask())
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.old-"))
        os.rename(path, old / path.name)
        try:
            os.rename(work, path)
        except BaseException:
            os.rename(old / path.name, path)
            raise
        shutil.rmtree(old)
    else:
        os.rename(work, path)


def check_new_run(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    strange = [entry.name for entry in path.iterdir() if entry.name not in _NAMES] if path.is_dir() else [path.name]
    if strange:
        raise RunError(f"{path} exists and is not a run folder (it has {strange[0]}); expected a new path")
    if any(path.iterdir()):
        read_config(path)
    if not overwrite:
        raise RunError(f"run folder {path} exists; expected a new path, or --overwrite to replace it when done")


def environment() -> dict[str, Any]:
    """What a figure depends on besides the settings."""
    import transformers

    return {
        "sphere_kernels": sphere_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


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
    """The events of a run; a torn last line is named."""
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
    return events


def write_deltas(run: Path, editor: SphereEditor, result: EditResult, model_name: str) -> None:
    """Write ``deltas.safetensors``: for weight ``W [n, d]`` the tensors ``W.left [n, edits]``, ``W.right [edits, d]``
    (fp32, batches one after the other) and ``W.bits [n, d]`` (integers as wide as the weight)."""
    tensors: dict[str, Tensor] = {}
    weights = {}
    original, now = editor.original_weights(), editor.weights()
    for layer, updates in result.updates.items():
        name = editor.structure.down[layer].name
        tensors[f"{name}.left"] = torch.cat([u.left for u in updates], 1).contiguous()
        tensors[f"{name}.right"] = torch.cat([u.right for u in updates], 0).contiguous()
        tensors[f"{name}.bits"] = (_bits(original[layer]) ^ _bits(now[layer])).cpu()
        weights[name] = {
            "layer": layer,
            "dtype": str(now[layer].dtype),
            "before": tensor_sha256(original[layer]),
            "after": tensor_sha256(now[layer]),
        }
    sizes = [u.left.shape[1] for u in next(iter(result.updates.values()))]
    metadata = {
        "format": str(FORMAT),
        "model": model_name,
        "batches": json.dumps(sizes),
        "weights": json.dumps(weights),
    }
    with replacing(run / DELTAS) as path:
        save_file(tensors, path, metadata)


def weights_dtype(run: Path) -> torch.dtype:
    """The dtype of the weights that a run edited, as ``deltas.safetensors`` says."""
    path = run / DELTAS
    try:
        with safe_open(path, "pt") as file:
            names = {facts["dtype"] for facts in json.loads(file.metadata()["weights"]).values()}
        (name,) = names
        dtype = getattr(torch, name.removeprefix("torch."))
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    assert isinstance(dtype, torch.dtype)
    return dtype


@torch.no_grad()
def switch(run: Path, structure: ModelStructure, to: Literal["after", "before"]) -> list[str]:
    """Apply (``to="after"``) or revert (``to="before"``) a run on a model, bit for bit; returns the weights' names.

    Every weight's SHA-256 is checked before any is written, and the result's before it is written.

    Raises:
        RunError: the model has no such weight, or its bits are neither expected ones; nothing has been written then.
    """
    path = run / DELTAS
    here = "before" if to == "after" else "after"
    done = "applied" if to == "after" else "reverted"
    down = {d.name: d for d in structure.down}
    changed: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT):
                raise RunError(f"{path}: expected format {FORMAT}, found {metadata.get('format')!r}")
            for name, facts in json.loads(metadata["weights"]).items():
                if name not in down:
                    raise RunError(
                        f"{path} edits {name}, which this model does not have; it was made for "
                        f"{metadata.get('model')!r}"
                    )
                weight = down[name].weight
                found = tensor_sha256(weight)
                if found == facts[to] != facts[here]:
                    raise RunError(f"{name}: the edits of {run} are already {done}")
                if found != facts[here]:
                    raise RunError(
                        f"{name} ({list(weight.shape)}, {weight.dtype}) is not the weight that {run} expects: expected "
                        f"SHA-256 {facts[here][:16]}… ({facts['dtype']}), found {found[:16]}…; it was made for "
                        f"{metadata.get('model')!r}"
                    )
                bits = file.get_tensor(f"{name}.bits").to(weight.device)
                changed[name] = (_bits(weight) ^ bits).view(weight.dtype)
                if tensor_sha256(changed[name]) != facts[to]:
                    raise RunError(f"{path}: the stored bits of {name} are damaged (SHA-256 does not match)")
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    for name, weight in changed.items():
        down[name].weight.copy_(weight)
    return list(changed)


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(_BITS[weight.dtype.itemsize])


@contextmanager
def new_model_folder(path: Path) -> Iterator[Path]:
    """A folder to save a model in, moved to ``path`` when complete; ``path`` must be new."""
    if path.exists():
        raise RunError(f"{path} exists; expected a new folder for the model")
    with new_folder(path) as work:
        yield work
