"""How well edits went: success and accuracy, each with its standard error, and perplexity.

*Success* compares two targets: the wanted one must be the more probable (mean log-probability of a token), as in the
papers of ROME, MEMIT and AlphaEdit. *Accuracy* asks more: every token of the wanted target must be the argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.replay import frozen, last_logits
from sphere_edit.requests import EditRequest
from sphere_edit.text import token_windows
from sphere_edit.tokens import Row, check_fits, check_tokenizer, encode, pad_left

PERPLEXITY_TOKENS = 10_000
_TOKENS_PER_BATCH = 2048
_WINDOW = 256


@dataclass(frozen=True)
class Score:
    """Mean over ``n`` requests with its standard error (of the mean of per-request means); NaN where n is 0."""

    mean: float
    stderr: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        n = len(values)
        if n == 0:
            return cls(math.nan, math.nan, 0)
        mean = math.fsum(values) / n
        variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
        return cls(mean, math.sqrt(variance / n), n)

    def to_dict(self) -> dict[str, float | int | None]:
        return {"mean": finite(self.mean), "stderr": finite(self.stderr), "n": self.n}


def finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Evaluation:
    """Scores by name (``efficacy_success`` …) and, per request, what they were averaged from."""

    scores: dict[str, Score]
    per_request: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        return {name: score.to_dict() for name, score in self.scores.items()}


METRICS = ("efficacy", "generalization", "specificity")


def evaluate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Efficacy (the prompt), generalization (paraphrases) and specificity (neighbourhood), success and accuracy each.

    Efficacy and generalization want ``target_new``, specificity wants ``target_true``. Success needs both targets;
    requests without ``target_true`` count in accuracy only, and ``n`` says how many were scored.

    Args:
        model: causal LM; evaluated in evaluation mode, left as it was.
    """
    check_tokenizer(tokenizer)
    asked: dict[tuple[str, str], int] = {}

    def ask(prompt: str, target: str | None) -> int | None:
        return None if target is None else asked.setdefault((prompt, target), len(asked))

    wanted = []
    for r in requests:
        groups = (
            ("efficacy", [r.text], r.target_new, r.target_true),
            ("generalization", r.paraphrases, r.target_new, r.target_true),
            ("specificity", r.neighborhood if r.target_true else (), r.target_true, r.target_new),
        )
        wanted.append({name: [(ask(p, want), ask(p, other)) for p in ps] for name, ps, want, other in groups})
    log_probs, correct = score_targets(model, tokenizer, list(asked), progress)
    per_request = []
    for places in wanted:
        record: dict[str, float] = {}
        for name, pairs in places.items():
            both = [(w, o) for w, o in pairs if w is not None and o is not None]
            if both:
                record[f"{name}_success"] = sum(log_probs[w] > log_probs[o] for w, o in both) / len(both)
            if pairs:
                record[f"{name}_accuracy"] = sum(correct[w] for w, _ in pairs if w is not None) / len(pairs)
        per_request.append(record)
    names = [f"{metric}_{kind}" for metric in METRICS for kind in ("success", "accuracy")]
    scores = {name: Score.of([r[name] for r in per_request if name in r]) for name in names}
    return Evaluation(scores, per_request)


def score_targets(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[bool]]:
    """For each (prompt, target): mean log-probability of a target token, and whether all of them are the argmax.

    A row whose tokens begin another row is read off that row's logits, so the two targets of a prompt mostly cost one
    pass. Rows of like length run together, padded on the left so that they end in the same column.
    """
    rows = [encode(tokenizer, prompt, None, target) for prompt, target in asked]
    for row, (prompt, _) in zip(rows, asked, strict=True):
        check_fits(model, row, prompt)
    carried = _carriers(rows)
    order = sorted(carried, key=lambda i: (len(rows[i].ids), i))
    log_probs, correct = [0.0] * len(rows), [False] * len(rows)
    device = next(model.parameters()).device
    at = 0
    with frozen(model), torch.no_grad():
        while at < len(order):
            batch = _take(order, rows, at)
            at += len(batch)
            for i, mean, right in _score(model, rows, batch, carried, device):
                log_probs[i], correct[i] = mean, right
            if progress is not None:
                progress(at, len(order))
    return log_probs, correct


def _carriers(rows: Sequence[Row]) -> dict[int, list[int]]:
    """{row to run: rows to read off it}. In sorted order a row directly precedes those that it begins."""
    carried: dict[int, list[int]] = {}
    carrier = -1
    for i in sorted(range(len(rows)), key=lambda i: rows[i].ids, reverse=True):
        if carrier < 0 or rows[carrier].ids[: len(rows[i].ids)] != rows[i].ids:
            carrier = i
        carried.setdefault(carrier, []).append(i)
    return carried


def _take(order: Sequence[int], rows: Sequence[Row], at: int) -> Sequence[int]:
    """The next rows, as many as keep rows × longest within the budget."""
    end = at + 1
    while end < len(order) and (end - at + 1) * len(rows[order[end]].ids) <= _TOKENS_PER_BATCH:
        end += 1
    return order[at:end]


def _score(
    model: Any, rows: Sequence[Row], batch: Sequence[int], carried: dict[int, list[int]], device: torch.device
) -> Iterator[tuple[int, float, bool]]:
    def first(carrier: int, i: int) -> int:
        """Where row i's target begins, counted from the end of its carrier."""
        return len(rows[carrier].ids) - len(rows[i].ids) + len(rows[i].target)

    keep = max(first(carrier, i) for carrier in batch for i in carried[carrier])
    inputs: dict[str, Any] = pad_left([rows[i].ids for i in batch], device)
    logits: Tensor = model(**inputs, use_cache=False, **last_logits(model, keep)).logits[:, -keep:]
    for carrier, own in zip(batch, logits, strict=True):
        for i in carried[carrier]:
            target = torch.tensor(rows[i].target, device=device)
            start = keep - first(carrier, i)
            at = own[start : start + len(target)].float()
            picked = at.log_softmax(-1).gather(1, target[:, None])
            yield i, float(picked.mean()), bool((at.argmax(-1) == target).all())


def perplexity(model: Any, tokenizer: Any, text: str = "heldout", tokens: int = PERPLEXITY_TOKENS) -> float:
    """exp of the mean NLL per token over consecutive windows of a text.

    Args:
        text: ``heldout`` (the package's own), or the path of a text file.
        tokens: how many are read at most.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with frozen(model), torch.no_grad():
        for window in token_windows(tokenizer, text, _WINDOW, tokens):
            ids = window.to(device)[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    if count == 0:
        raise ValueError(f"text {text!r} has fewer than two tokens; perplexity needs at least two")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows past 709; such a model says nothing
