"""Context prefixes: facts are optimised after a few sentences, so that they hold in every context."""

from __future__ import annotations

from typing import Any

import torch

from sphere_edit.model.generation import TOP_5, continue_rows
from sphere_edit.model.tokens import encode, leading_tokens

_OPENINGS = ("The", "Therefore", "Because", "I", "You")


def generate_contexts(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """``["{}"]`` and ``count`` prefixes ``"<generated>. {}"``, sampled (top 5) by the model itself with a fixed seed.

    Models use the first token of a row as a sink for their attention, not as a word. Where the tokenizer adds no such
    token, a newline takes the first place: a model with an opening word there writes no text.

    Args:
        model: a causal LM in evaluation mode.
        count: number of generated prefixes; 0 leaves the bare prompt only.
        length: new tokens per prefix.
        seed: seed of the sampling; the caller's random state does not change.
    """
    if count == 0:
        return ["{}"]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    templates = ["{}"]
    before = "" if leading_tokens(tokenizer) else "\n"
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for i in range(count):
            row = encode(tokenizer, before + _OPENINGS[i % len(_OPENINGS)]).ids
            out = continue_rows(model, tokenizer, [row], length, min_new_tokens=length, **TOP_5)
            text = tokenizer.decode(out[0], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates


def in_context(context: str, prompt: str) -> str:
    """Put a prompt template (with its ``{}``) into a context template."""
    return context.replace("{}", prompt)
