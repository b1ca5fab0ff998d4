"""Text for the key covariance and for perplexity: a file, or the prose in the package."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.model.tokens import leading_tokens

_BUILTIN = {"builtin": "builtin.txt", "heldout": "heldout.txt"}


def text_path(spec: str) -> Path:
    """Path of a text: ``builtin`` and ``heldout`` are the package's own; any other is a path (``.txt``, ``.gz``)."""
    path = Path(__file__).parents[1] / "data" / "texts" / _BUILTIN[spec] if spec in _BUILTIN else Path(spec)
    if not path.is_file():
        raise FileNotFoundError(f"text {spec!r}: no such file; expected a path, or one of {', '.join(_BUILTIN)}")
    return path


def text_lines(spec: str) -> Iterator[str]:
    """The lines of a text, each with its line end."""
    path = text_path(spec)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            yield from file
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"text {spec!r} cannot be read: {error}") from error


def token_windows(tokenizer: Any, spec: str, window: int, limit: int) -> Iterator[Tensor]:
    """Stream a text as consecutive windows ``[window]`` of token ids; the last may be shorter, but not below 2.

    Args:
        window: tokens per window, including BOS if the tokenizer adds one.
        limit: stop after this many tokens.
    """
    head = leading_tokens(tokenizer)
    size, pending, given = window - len(head), [], 0
    for line in text_lines(spec):
        pending += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        while len(pending) >= size and given < limit:
            yield torch.tensor(head + pending[:size])
            pending, given = pending[size:], given + window
        if given >= limit:
            return
    if len(pending) + len(head) >= 2:
        yield torch.tensor(head + pending)
