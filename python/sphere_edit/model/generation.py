"""Generate text after rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_edit.model.inference import frozen
from sphere_edit.model.structure import check_usable
from sphere_edit.model.tokens import encode, pad_left

TOP_5: dict[str, Any] = {"do_sample": True, "top_k": 5, "top_p": 1.0, "temperature": 1.0}


def continue_rows(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], tokens: int, **sampling: Any) -> Tensor:
    """Token rows ``[rows, longest + tokens]``: the prompts, padded on the left, each with its continuation.

    Of the model's own generation settings only the special tokens count; all are restored afterwards.

    Args:
        model: in evaluation mode, without gradients.
        tokens: the most new tokens; after an end of text, end-of-text tokens fill the row.
        sampling: further arguments of ``generate``.
    """
    from transformers import GenerationConfig  # half a second to import

    inputs, own = pad_left(rows, next(model.parameters()).device), model.generation_config
    known = own or model.config.get_text_config(decoder=True)
    special = {name: getattr(known, name, None) for name in ("bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**special, pad_token_id=tokenizer.eos_token_id)
    try:
        out: Tensor = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            **sampling,
        )
    finally:
        model.generation_config = own
    return out


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy continuations of ``prompts``, without the prompts."""
    check_usable(model)
    rows = [encode(tokenizer, prompt).ids for prompt in prompts]
    with frozen(model), torch.no_grad():
        out = continue_rows(model, tokenizer, rows, tokens, do_sample=False)
    return [tokenizer.decode(row[max(map(len, rows)) :], skip_special_tokens=True) for row in out]
