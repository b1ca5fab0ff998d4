"""One whole run: evaluate, edit, evaluate again, and leave a folder behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphere_edit import runs
from sphere_edit.config import EditConfig
from sphere_edit.contexts import PLAIN_GENERATION
from sphere_edit.editor import EditResult, Event, SphereEditor
from sphere_edit.metrics import PERPLEXITY_TOKENS, Evaluation, evaluate, finite, perplexity
from sphere_edit.replay import frozen
from sphere_edit.report import write_report
from sphere_edit.requests import EditRequest
from sphere_edit.text import token_windows
from sphere_edit.tokens import encode, pad_left
from sphere_kernels import principal_directions

_NEUTRAL = ("Water boils when", "Once upon a time, there was a", "The best way to learn a new language is")
_SAMPLE_TOKENS = 14


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides editing.

    Args:
        model_name, data_name: as the user gave them; for the record.
        out: the run folder.
        perplexity_text, perplexity_tokens: see `metrics.perplexity`.
        save_model: also write the edited model.
        overwrite: replace an earlier run at ``out`` once this one is complete.
    """

    model_name: str
    data_name: str
    out: Path
    perplexity_text: str = "heldout"
    perplexity_tokens: int = PERPLEXITY_TOKENS
    save_model: bool = False
    overwrite: bool = False


def run(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    config: EditConfig | str,
    options: RunOptions,
    on_event: Callable[[Event], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EditResult:
    """Edit ``requests`` and write the run folder ``options.out`` (see `runs`); the model stays edited.

    Raises:
        ValueError and its kinds: anything that does not fit, before a weight or ``out`` is touched.
    """
    progress = on_progress or (lambda what, done, total: None)
    if not requests:
        raise ValueError(f"{options.data_name}: no requests; expected at least one edit")
    runs.check_new_run(options.out, options.overwrite)
    if next(token_windows(tokenizer, options.perplexity_text, 2, 2), None) is None:
        raise ValueError(f"perplexity_text {options.perplexity_text!r} has no text; expected at least two tokens")
    editor = SphereEditor(model, tokenizer, config, on_progress=progress)
    editor.check(requests)
    with runs.new_run(options.out, options.overwrite) as folder:
        with (folder / runs.METRICS).open("w", encoding="utf-8") as log:

            def emit(event: Event) -> None:
                log.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
                log.flush()
                if on_event is not None:
                    on_event(event)

            editor.on_event = emit
            start = time.perf_counter()
            runs.write_config(folder, _record(editor, options, len(requests)))
            runs.write_jsonl(folder / runs.REQUESTS, [vars(request) for request in requests])
            prompts = sample_prompts(requests)

            def look(when: str) -> tuple[Evaluation, list[str]]:
                scores = evaluate(model, tokenizer, requests, lambda done, n: progress(f"scores {when}", done, n))
                value = perplexity(model, tokenizer, options.perplexity_text, options.perplexity_tokens)
                emit({"event": "evaluation", "when": when, "scores": scores.to_dict(), "perplexity": finite(value)})
                _emit_spectra(editor, when, emit)
                return scores, complete(model, tokenizer, [prompt for _, prompt in prompts])

            editor.prepare()
            before, said_before = look("before")
            result = editor.edit(requests)
            runs.write_deltas(folder, editor, result, options.model_name)
            after, said_after = look("after")
            for request, was, now in zip(requests, before.per_request, after.per_request, strict=True):
                emit({"event": "request", "id": request.id, "before": was, "after": now})
            for (kind, prompt), was_said, now_said in zip(prompts, said_before, said_after, strict=True):
                emit({"event": "sample", "kind": kind, "prompt": prompt, "before": was_said, "after": now_said})
            if options.save_model:
                model.save_pretrained(folder / runs.MODEL)
                tokenizer.save_pretrained(folder / runs.MODEL)
            emit({"event": "finished", "seconds": time.perf_counter() - start})
        write_report(folder)
    return result


def _record(editor: SphereEditor, options: RunOptions, edits: int) -> dict[str, Any]:
    return {
        "model": options.model_name,
        "data": options.data_name,
        "edits": edits,
        "perplexity_text": options.perplexity_text,
        "perplexity_tokens_at_most": options.perplexity_tokens,
        "dtype": str(editor.weights()[editor.config.layers[0]].dtype),
        "device": str(editor.structure.device),
        "settings": editor.config.to_dict(),
        "environment": runs.environment(),
    }


def _emit_spectra(editor: SphereEditor, when: str, emit: Callable[[Event], None]) -> None:
    """Eigenvalues of ``ŴᵀŴ/n`` of each edited weight, and how many of them the principal directions are."""
    for layer, weight in editor.weights().items():
        directions = principal_directions(weight, editor.config.energy_ratio)
        eigenvalues = [float(f"{value:.6g}") for value in directions.eigenvalues.tolist()]
        emit(
            {
                "event": "spectrum",
                "when": when,
                "layer": layer,
                "rank": int(directions.rank),
                "energy_ratio": float(directions.energy_ratio),
                "eigenvalues": eigenvalues,
            }
        )


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
