"""Apply or revert a run, bit for bit on any machine.

Adding low-rank factors again could round differently on another machine, and subtracting them does not restore the old
bits. So ``deltas.safetensors`` holds, per weight, the exclusive or of the bits before and after. Applied to either
weight, the deltas give the other one, on any machine; SHA-256 sums tell which of the two a model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphere_edit.files import read_facts, tensor_sha256, write_tensors
from sphere_edit.model.structure import ModelStructure
from sphere_edit.runs.journal import FORMAT, JOURNAL, RunError, resume_command
from sphere_edit.runs.run_folder import DELTAS

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_deltas(
    run: Path, names: Mapping[int, str], before: Mapping[int, Tensor], after: Mapping[int, Tensor], model: str
) -> None:
    """Write ``deltas.safetensors``: for each weight ``[n, d]`` the tensor ``W.bits [n, d]``, integers of equal width.

    Args:
        names: names of the edited weights, by layer.
        before, after: the weights by layer.
        model: the user's name for the model.
    """
    tensors = {f"{name}.bits": (_bits(before[layer]) ^ _bits(after[layer])).cpu() for layer, name in names.items()}
    weights = {
        name: {
            "layer": layer,
            "dtype": str(after[layer].dtype),
            "before": tensor_sha256(before[layer]),
            "after": tensor_sha256(after[layer]),
        }
        for layer, name in names.items()
    }
    write_tensors(run / DELTAS, tensors, {"format": FORMAT, "model": model, "weights": weights})


def weights_dtype(run: Path) -> torch.dtype:
    """The dtype of the weights that a run edited, from ``deltas.safetensors``.

    Raises:
        RunError: the file is missing, damaged, or of another version.
    """
    try:
        (name,) = {facts["dtype"] for facts in _deltas_facts(run)["weights"].values()}
        dtype = getattr(torch, name.removeprefix("torch."))
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{run / DELTAS} cannot be read: {error}") from error
    assert isinstance(dtype, torch.dtype)
    return dtype


def _deltas_facts(run: Path) -> dict[str, Any]:
    path = run / DELTAS
    if not path.exists() and (run / JOURNAL).exists():
        raise RunError(f"{run} is not finished (it has no {DELTAS}); go on with: {resume_command(run)}")
    try:
        facts = read_facts(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if facts.get("format") != FORMAT:
        raise RunError(f"{path}: expected format {FORMAT}, found {facts.get('format')!r}")
    return facts


@torch.no_grad()
def switch(run: Path, structure: ModelStructure, to: Literal["after", "before"]) -> list[str]:
    """Apply (``to="after"``) or revert (``to="before"``) a run on a model, bit for bit; returns the weights' names.

    The SHA-256 of every weight and of every result is checked before any weight is written.

    Raises:
        RunError: the model lacks a weight of the run, a weight's bits are not the expected ones, or the file is
            damaged; nothing is written.
    """
    path = run / DELTAS
    here = "before" if to == "after" else "after"
    done = "applied" if to == "after" else "reverted"
    maps = {m.name: m for m in structure.edited}
    changed: dict[str, Tensor] = {}
    metadata = _deltas_facts(run)
    try:
        with safe_open(path, "pt") as file:
            for name, facts in metadata["weights"].items():
                if name not in maps:
                    raise RunError(
                        f"{path} edits {name}, which this model does not have; it was made for "
                        f"{metadata.get('model')!r}"
                    )
                weight = maps[name].weight
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
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    for name, weight in changed.items():
        maps[name].weight.copy_(weight)
    return list(changed)


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(_BITS[weight.dtype.itemsize])
