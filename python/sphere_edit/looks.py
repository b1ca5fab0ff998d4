"""What is seen of a model before and after a run: scores, perplexity, spectra, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphere_edit.contexts import PLAIN_GENERATION
from sphere_edit.editor import SphereEditor
from sphere_edit.files import replacing
from sphere_edit.metrics import evaluate, finite, perplexity
from sphere_edit.records import Event
from sphere_edit.replay import frozen
from sphere_edit.requests import EditRequest
from sphere_edit.tokens import encode, pad_left
from sphere_kernels import principal_directions

_NEUTRAL = ("Water boils when", "Once upon a time, there was a", "The best way to learn a new language is")
_SAMPLE_TOKENS = 14


@dataclass(frozen=True)
class Look:
    """One look at a model.

    Args:
        events: to be told.
        per_request: what each request scored.
        said: completions of `sample_prompts`.
    """

    events: list[Event]
    per_request: list[dict[str, float]]
    said: list[str]

    def write(self, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(vars(self), allow_nan=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Look:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def look(
    editor: SphereEditor,
    requests: Sequence[EditRequest],
    when: str,
    text: str,
    tokens: int,
    progress: Callable[[str, int, int], None],
) -> Look:
    """Look at the editor's model as it is.

    Args:
        when: ``before`` or ``after``.
        text, tokens: of the perplexity.
    """
    model, tokenizer = editor.model, editor.tokenizer
    found = evaluate(model, tokenizer, requests, lambda done, n: progress(f"scores {when}", done, n))
    value = perplexity(model, tokenizer, text, tokens)
    event = {"event": "evaluation", "when": when, "scores": found.to_dict(), "perplexity": finite(value)}
    said = complete(model, tokenizer, [prompt for _, prompt in sample_prompts(requests)])
    return Look([event, *_spectra(editor, when)], found.per_request, said)


def compare(requests: Sequence[EditRequest], before: Look, after: Look) -> Iterator[Event]:
    """What became of each request, and of each completion."""
    for request, was, now in zip(requests, before.per_request, after.per_request, strict=True):
        yield {"event": "request", "id": request.id, "before": was, "after": now}
    for (kind, prompt), said, says in zip(sample_prompts(requests), before.said, after.said, strict=True):
        yield {"event": "sample", "kind": kind, "prompt": prompt, "before": said, "after": says}


def _spectra(editor: SphereEditor, when: str) -> Iterator[Event]:
    """Eigenvalues of ``ŴᵀŴ/n`` of each edited weight, and how many of them the principal directions are."""
    for layer, weight in editor.weights().items():
        directions = principal_directions(weight, editor.config.energy_ratio)
        yield {
            "event": "spectrum",
            "when": when,
            "layer": layer,
            "rank": int(directions.rank),
            "energy_ratio": float(directions.energy_ratio),
            "eigenvalues": [float(f"{value:.6g}") for value in directions.eigenvalues.tolist()],
        }


def sample_prompts(requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """(kind, prompt) of the completions shown: edited facts, paraphrases of them, neighbours, and neutral ones."""
    chosen = requests[:: max(1, len(requests) // 4)][:4]
    prompts = [("edited", r.text) for r in chosen]
    prompts += [("paraphrase", r.paraphrases[0]) for r in chosen[:2] if r.paraphrases]
    prompts += [("neighbor", r.neighborhood[0]) for r in chosen if r.neighborhood][:2]
    return prompts + [("neutral", prompt) for prompt in _NEUTRAL]


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = _SAMPLE_TOKENS) -> list[str]:
    """Greedy continuations of ``prompts``, without the prompts."""
    rows = [encode(tokenizer, prompt).ids for prompt in prompts]
    inputs = pad_left(rows, next(model.parameters()).device)
    with frozen(model), torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            **PLAIN_GENERATION,
            pad_token_id=tokenizer.eos_token_id,
        )
    width = inputs["input_ids"].shape[1]
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]
