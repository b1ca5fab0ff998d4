"""Second moments of each edited layer's keys over text, ``E[k kᵀ]``, and their eigenvectors, kept on disk.

A file's name gives model, layer and text, and ends in a hash of everything that determines the moment, such as the
model's weights up to the layer, the layer, the text, its tokenizer and the number of tokens read. An edited or another
model therefore never gets a wrong file.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sphere_edit.config import EditConfig
from sphere_edit.files import file_sha256, replacing, tensor_bytes, tensor_sha256
from sphere_edit.model.inference import frozen
from sphere_edit.model.partial_forward import record
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.text import text_path, token_windows
from sphere_edit.model.tokens import readable

_WINDOW, _ROWS = 256, 8
_FEW = 8  # tokens per dimension; with fewer the covariance is doubtful
_FORMAT = "1"


def layer_fingerprints(model: Any, structure: ModelStructure, layers: Sequence[int]) -> dict[int, str]:
    """SHA-256 by layer of all that its keys depend on: settings, parameters outside blocks, blocks up to the layer."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=True).encode())
    inside = {id(p) for block in structure.blocks for p in block.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    out = {}
    for i, parameters in enumerate([outside, *(list(b.parameters()) for b in structure.blocks[: layers[-1] + 1])]):
        for parameter in parameters:
            digest.update(f"{parameter.dtype}{list(parameter.shape)}".encode())
            digest.update(tensor_bytes(parameter))
        if i - 1 in layers:
            out[i - 1] = digest.copy().hexdigest()
    return out


def key_covariances(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    layers: Sequence[int],
    config: EditConfig,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> KeyCovariances:
    """Key covariances ``{layer: [d, d]}``, fp64 on the model's device, from the cache or by one pass over the text.

    Args:
        layers: ascending; one pass measures all layers that are not in the cache.
        cache: folder of the files; made if missing.
        progress: called with (tokens read, tokens at most).

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    described = _described(model, tokenizer, structure, layers, config)
    paths, found = _cached(described, model, config, cache)
    missing = [layer for layer in layers if found[layer] is None]
    if missing:
        moments = _measure(model, tokenizer, structure, missing, config, progress)
        for layer in missing:
            moment = moments.sums[layer] / moments.tokens
            _save(paths[layer], {"moment": moment}, {**described[layer], "tokens": str(moments.tokens)})
            found[layer] = moment
        _warn_if_few(moments.tokens, max(len(moment) for moment in moments.sums.values()))
    moved = {layer: moment.to(structure.device) for layer, moment in found.items() if moment is not None}
    return KeyCovariances(moved, paths)


class KeyCovariances(dict[int, Tensor]):
    """Second moments of keys by layer, ``[d, d]`` fp64; `eigh` keeps eigendecompositions beside their files.

    Args:
        paths: the file of each layer's moment.
    """

    def __init__(self, moments: Mapping[int, Tensor], paths: Mapping[int, Path]) -> None:
        super().__init__(moments)
        self._paths = paths

    def eigh(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[d]``, ascending, and eigenvectors ``[d, d]``, as `torch.linalg.eigh` gives them.

        A warning says where they cannot be kept.
        """
        moment = self[layer]
        path, described = self._paths[layer].with_suffix(".eigh.safetensors"), {"moment": tensor_sha256(moment)}
        found = _load(path, described, "values", "vectors")
        if found is None:
            values, vectors = torch.linalg.eigh(moment)
            try:
                _save(path, {"values": values, "vectors": vectors}, described)
            except (OSError, SafetensorError) as error:  # the folder may only be read, or is full
                warnings.warn(f"eigenvectors are not kept, each start computes them: {error}", stacklevel=2)
            return values, vectors
        return found[0].to(moment.device), found[1].to(moment.device)


def covariances_to_measure(
    model: Any, tokenizer: Any, structure: ModelStructure, layers: Sequence[int], config: EditConfig, cache: Path
) -> list[int]:
    """The layers whose covariance is not in the cache; `key_covariances` with the same arguments would measure them."""
    _, found = _cached(_described(model, tokenizer, structure, layers, config), model, config, cache)
    return [layer for layer, moment in found.items() if moment is None]


def _cached(
    described: dict[int, dict[str, str]], model: Any, config: EditConfig, cache: Path
) -> tuple[dict[int, Path], dict[int, Tensor | None]]:
    """Each layer's file, and each layer's moment, None where the file does not have it."""
    paths = {layer: _path(cache, own, model, config.covariance_text) for layer, own in described.items()}
    found = {layer: _load(paths[layer], own, "moment") for layer, own in described.items()}
    return paths, {layer: None if own is None else own[0] for layer, own in found.items()}


def _described(
    model: Any, tokenizer: Any, structure: ModelStructure, layers: Sequence[int], config: EditConfig
) -> dict[int, dict[str, str]]:
    """Everything that determines each layer's covariance."""
    text = file_sha256(text_path(config.covariance_text))
    prints = layer_fingerprints(model, structure, layers)
    return {
        layer: {
            "format": _FORMAT,
            "weights": prints[layer],
            "layer": str(layer),
            "text": text,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "tokens_at_most": str(config.covariance_tokens),
            "window": str(readable(model, _WINDOW)),
            "computed": f"torch {torch.__version__}, {structure.device.type}, {torch.get_num_threads()} threads",
        }
        | ({} if structure.modules == "down" else {"modules": structure.modules})
        for layer in layers
    }


def _measure(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    layers: Sequence[int],
    config: EditConfig,
    progress: Callable[[int, int], None] | None,
) -> KeyMoments:
    moments = KeyMoments(structure, layers)
    pending: list[Tensor] = []

    def flush() -> None:
        if pending:
            moments.add(model, torch.stack(pending).to(structure.device))
            pending.clear()
            if progress is not None:
                progress(moments.tokens, config.covariance_tokens)

    with frozen(model):
        for window in token_windows(
            tokenizer, config.covariance_text, readable(model, _WINDOW), config.covariance_tokens
        ):
            if pending and len(window) != len(pending[0]):
                flush()
            pending.append(window)
            if len(pending) == _ROWS:
                flush()
        flush()
    if progress is not None:
        progress(moments.tokens, moments.tokens)
    if moments.tokens == 0:
        raise ValueError(f"covariance_text {config.covariance_text!r} has no text; expected at least two tokens")
    return moments


def _warn_if_few(tokens: int, d: int) -> None:
    if tokens < _FEW * d:
        warnings.warn(
            f"the key covariance of {d}-wide keys rests on {tokens} tokens only, so much of its null space is want of "
            f"text; give covariance_text and covariance_tokens at least {_FEW} × {d} tokens",
            stacklevel=3,
        )


def _path(cache: Path, described: dict[str, str], model: Any, text: str) -> Path:
    """Path of the file with this hash, under any model name; the names are for human readers."""
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    names = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name)[:40] for name in (model.config.name_or_path, text)]
    made = cache / f"{names[0] or 'model'}-layer{described['layer']}-{names[1]}-{key}.safetensors"
    return next(cache.glob(f"*-{key}.safetensors"), made)


def _load(path: Path, described: dict[str, str], *names: str) -> list[Tensor] | None:
    """Cached tensors; None if the file is missing, damaged or of another origin (they are then computed anew)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found: list[Tensor] = [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError, KeyError):
        return None
    same = all(metadata.get(key) == value for key, value in described.items())
    return found if same and all(bool(torch.isfinite(tensor).all()) for tensor in found) else None


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


class KeyMoments:
    """Sums ``kᵀk`` of some layers' keys, fp64 ``[d, d]`` each, taken while the model runs over text."""

    def __init__(self, structure: ModelStructure, layers: Sequence[int]) -> None:
        self._structure, self._layers = structure, layers
        self.sums: dict[int, Tensor] = {}
        self.tokens = 0

    @torch.no_grad()
    def add(self, model: Any, ids: Tensor) -> None:
        """Add the keys of ``ids`` ``[rows, tokens]``, which have no padding."""
        handles = [
            self._structure.edited[layer].module.register_forward_pre_hook(self._hook(layer)) for layer in self._layers
        ]
        try:
            last = self._layers[-1]
            record(model, self._structure, {"input_ids": ids, "use_cache": False}, last, last)
        finally:
            for handle in handles:
                handle.remove()
        self.tokens += ids.numel()

    def _hook(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys = args[0].flatten(0, -2).float()
            product = (keys.T @ keys).double()
            self.sums[layer] = self.sums[layer] + product if layer in self.sums else product

        return hook
