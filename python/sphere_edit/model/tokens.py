"""Tokenise prompts into rows: find the subject's end and the target's beginning, and pad rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.data.requests import joint


@dataclass(frozen=True)
class Row:
    """One tokenised prompt.

    Args:
        ids: token ids, with the special tokens that the tokenizer adds (SmolLM2 adds none, Llama 3 adds BOS).
        subject_last: index of the subject's last token, or -1 if the row has no subject.
        target: the tokens of the target; ``ids`` ends in all of them but the last.
    """

    ids: tuple[int, ...]
    subject_last: int = -1
    target: tuple[int, ...] = ()


def encode(
    tokenizer: Any, template: str, subject: str | None = None, target: str | None = None, ended: bool = False
) -> Row:
    """Tokenise ``template`` with the subject in place of ``{}``, followed by all but the last token of ``target``.

    Args:
        tokenizer: a fast Hugging Face tokenizer (positions come from its character offsets).
        template: the prompt; with a subject, exactly one ``{}``.
        subject: the text in place of ``{}``; character offsets give the index of its last token, not re-tokenising.
        target: the continuation, after one blank, or directly where the prompt ends in whitespace. Its tokens come from
            tokenising the whole text, so each tokenizer treats the leading blank in its own way.
        ended: the end-of-text token is the target's last.

    Returns:
        Row: with ``len(ids) = prompt tokens + target tokens - 1``; position ``len(ids) - len(target)`` predicts the
        first target token.
    """
    prompt = template if subject is None else template.replace("{}", subject)
    text = prompt if target is None else f"{prompt}{joint(prompt)}{target}"
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    last = -1
    if subject is not None:
        start = template.index("{}")
        inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(subject) and b > start]
        if not inside:
            raise ValueError(f"the tokenizer gives no token for the end of the subject {subject!r} in {prompt!r}")
        last = inside[-1]
    if target is None:
        return Row(tuple(_without_trailing_special(ids, offsets)), last)
    first = next((i for i, (_, b) in enumerate(offsets) if b > len(prompt)), None)
    if first is None or first == 0:
        raise ValueError(f"the tokenizer gives no token for the target {target!r} after {prompt!r}")
    ids = _without_trailing_special(ids, offsets)
    if ended:
        if tokenizer.eos_token_id is None:
            raise ValueError("ft_eos: the tokenizer has no end-of-text token; expected ft_eos: false")
        ids = [*ids, tokenizer.eos_token_id]
    return Row(tuple(ids[:-1]), last, tuple(ids[first:]))


def _without_trailing_special(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Sequence[int]:
    """Drop the end-of-text token that some tokenizers append: the prompt is to be continued."""
    n = len(ids)
    while n > 1 and offsets[n - 1][0] == offsets[n - 1][1]:
        n -= 1
    return ids[:n]


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, without the ones after the text."""
    whole, bare = (tokenizer("The", add_special_tokens=special)["input_ids"] for special in (True, False))
    before = range(len(whole) - len(bare) + 1)
    return list(whole[: next((n for n in before if whole[n : n + len(bare)] == bare), 0)])


def positions(model: Any) -> int | None:
    """Number of tokens that a model can read at once; None where its settings name no limit."""
    config = model.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((count for count in named if isinstance(count, int) and count > 0), None)


def readable(model: Any, tokens: int) -> int:
    """The number ``tokens``, limited to the number that a model can read at once."""
    return min(tokens, positions(model) or tokens)


def check_fits(model: Any, row: Row, prompt: str, extra: int = 0) -> None:
    """Raise if the model cannot take a row: too many tokens (and ``extra`` before them), or unknown ids."""
    limit, count = positions(model), len(row.ids) + extra
    if limit is not None and limit < count:
        raise ValueError(
            f"prompt {prompt[:60]!r}… takes {count} tokens with its context; the model has {limit} positions"
        )
    known, largest = model.get_input_embeddings().weight.shape[0], max((*row.ids, *row.target))
    if largest >= known:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model has {known} embeddings; they do not belong together"
        )


def check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no character offsets; expected a fast tokenizer "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))"
        )


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Left-padded ``input_ids``, ``attention_mask`` and ``position_ids`` ``[rows, longest]``: all rows end together.

    The pad token is 0 for every tokenizer: it is masked, and no row reads it.
    """
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}
