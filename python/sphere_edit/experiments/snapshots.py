"""Snapshots of a model before, during and after a run: scores, perplexity, spectra, and completions."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sphere_edit.data.requests import EditRequest
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.answers import evaluate_answers
from sphere_edit.evaluation.judge import Judge
from sphere_edit.evaluation.metrics import Evaluation, evaluate, finite, perplexity
from sphere_edit.evaluation.weights import cosines
from sphere_edit.events import Event
from sphere_edit.files import replacing
from sphere_edit.model.generation import complete
from sphere_kernels import principal_directions

_NEUTRAL = ("Water boils when", "Once upon a time, there was a", "The best way to learn a new language is")
_SAMPLE_TOKENS = 14
_NEURONS = 32


@dataclass(frozen=True)
class Snapshot:
    """The figures of a model at one time.

    Args:
        events: events for the log: evaluation, spectra and cosines.
        per_request: scores of each request.
        said: completions of `sample_prompts`.
    """

    events: list[Event]
    per_request: list[dict[str, float]]
    said: list[str]

    def write(self, path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(vars(self), allow_nan=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def take(
    editor: SphereEditor,
    requests: Sequence[EditRequest],
    when: str,
    text: str,
    tokens: int,
    progress: Callable[[str, int, int], None],
    answers: bool = False,
    judge: Judge | None = None,
) -> Snapshot:
    """Take a snapshot of the editor's model with the final weights.

    Args:
        when: ``before`` or ``after``.
        text, tokens: text of the perplexity, and most tokens to read.
        answers: also score free answers of the model.
        judge: judge of these answers, or None.
    """
    model, tokenizer = editor.model, editor.tokenizer
    with editor.finished():
        found = evaluate(model, tokenizer, requests, lambda done, n: progress(f"scores {when}", done, n))
        if answers:
            name = f"answers {when}"
            tell = functools.partial(progress, name)
            said, _ = evaluate_answers(model, tokenizer, requests, progress=tell, judge=judge)
            found |= said
        value = perplexity(model, tokenizer, text, tokens)
        event = {"event": "evaluation", "when": when, "scores": found.to_dict(), "perplexity": finite(value)}
        completed = complete(model, tokenizer, [prompt for _, prompt in sample_prompts(requests)], _SAMPLE_TOKENS)
        return Snapshot([event, *_spectra(editor, when), *_cosines(editor, when)], found.per_request, completed)


def sample(requests: Sequence[EditRequest], count: int | None, seed: str) -> list[EditRequest]:
    """Draw ``count`` requests at random and keep the order; all if there are no more or ``count`` is None."""
    places = range(len(requests))
    if count is not None and count < len(requests):
        return [requests[i] for i in sorted(random.Random(seed).sample(places, count))]
    return list(requests)


def curve(
    editor: SphereEditor, requests: Sequence[EditRequest], count: int, text: str, tokens: int, answers: int = 0
) -> Event:
    """Evaluate the editor's model during a run: scores of three groups of requests, and perplexity.

    The groups are a sample of the edits so far, the first edits (retention) and the newest batch, each of at most
    ``count`` requests. A request in several groups is scored once.

    Args:
        answers: most requests of each group to score free answers for, too. Each prompt of such a request takes up to
            `answers.ANSWER_TOKENS` forward steps.
    """
    model, tokenizer = editor.model, editor.tokenizer
    with editor.finished():
        groups = _groups(editor, requests, count)
        found = _by_group(groups, lambda asked: evaluate(model, tokenizer, asked))
        if answers:
            groups = _groups(editor, requests, answers)
            said = _by_group(groups, lambda asked: evaluate_answers(model, tokenizer, asked)[0])
            found = {name: scores | said[name] for name, scores in found.items()}
        value = perplexity(model, tokenizer, text, tokens)
    event: Event = {"event": "curve", "batch": editor.batches, "edits": editor.edits}
    return event | found | {"perplexity": finite(value)}


def _groups(editor: SphereEditor, requests: Sequence[EditRequest], count: int) -> dict[str, Sequence[EditRequest]]:
    done = requests[: editor.edits]
    newest = (editor.edits - 1) % editor.config.batch_size + 1
    return {
        "scores": sample(done, count, f"{editor.config.seed}/{editor.edits}"),
        "first": done[:count],
        "last": done[-newest:][:count],
    }


def _by_group(
    groups: Mapping[str, Sequence[EditRequest]], evaluation: Callable[[list[EditRequest]], Evaluation]
) -> dict[str, dict[str, Any]]:
    """Scores of each group; a request in several groups is evaluated once."""
    asked = list({id(request): request for group in groups.values() for request in group}.values())
    found, places = evaluation(asked), {id(request): i for i, request in enumerate(asked)}
    return {name: found.subset([places[id(r)] for r in group]).to_dict() for name, group in groups.items()}


def compare(requests: Sequence[EditRequest], before: Snapshot, after: Snapshot) -> Iterator[Event]:
    """Events that compare each request's scores and each completion before and after the run."""
    for request, was, now in zip(requests, before.per_request, after.per_request, strict=True):
        yield {"event": "request", "id": request.id, "before": was, "after": now}
    for (kind, prompt), said, says in zip(sample_prompts(requests), before.said, after.said, strict=True):
        yield {"event": "sample", "kind": kind, "prompt": prompt, "before": said, "after": says}


def _spectra(editor: SphereEditor, when: str) -> Iterator[Event]:
    """Events with the eigenvalues of ``ŴᵀŴ/n`` of each edited weight and the number of principal directions."""
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


def _cosines(editor: SphereEditor, when: str) -> Iterator[Event]:
    """Events with the cosines between a fixed sample of neurons of each edited weight, each pair once, and the mean
    ``|cosine|`` over all pairs of the weight."""
    for layer, weight in editor.weights().items():
        seeded = torch.Generator().manual_seed(editor.config.seed)
        neurons = torch.randperm(len(weight), generator=seeded)[:_NEURONS].sort().values
        found, mean = cosines(weight, neurons.to(weight.device))
        yield {
            "event": "cosines",
            "when": when,
            "layer": layer,
            "neurons": neurons.tolist(),
            "cosines": [[round(value, 4) for value in row[i + 1 :]] for i, row in enumerate(found.tolist())],
            "mean_abs": finite(mean),
        }


def sample_prompts(requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """(kind, prompt) of the completions shown: edited facts, paraphrases, neighbours, and neutral prompts."""
    chosen = requests[:: max(1, len(requests) // 4)][:4]
    prompts = [("edited", r.text) for r in chosen]
    prompts += [("paraphrase", r.paraphrases[0]) for r in chosen[:2] if r.paraphrases]
    prompts += [("neighbor", r.neighborhood[0]) for r in chosen if r.neighborhood][:2]
    return prompts + [("neutral", prompt) for prompt in _NEUTRAL]
