"""Scores of edits: success, accuracy and token accuracy, each with a standard error; and perplexity.

*Success* compares two targets: the wanted target must be the more probable one (mean log-probability per token), as in
the papers of ROME, MEMIT and AlphaEdit. *Accuracy* asks more: every token of the wanted target must be the argmax.
*Token accuracy* is the share of target tokens that are the argmax: these papers use it for zsRE, EasyEdit for all data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphere_edit.data.requests import EditRequest
from sphere_edit.model.inference import compact_head, frozen, last_logits
from sphere_edit.model.partial_forward import keeps_only_keys
from sphere_edit.model.structure import check_usable
from sphere_edit.model.text import token_windows
from sphere_edit.model.tokens import check_fits, check_tokenizer, encode, pad_left, readable

PERPLEXITY_TOKENS = 10_000
_TOKENS_PER_BATCH = 2048
_PADDING_PER_BATCH = 64
_WINDOW = 256


@dataclass(frozen=True)
class Score:
    """Mean over ``n`` requests with standard error (of the mean of per-request means); NaN if n is 0."""

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


def finite(value: float | None) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Evaluation:
    """Scores by name (``efficacy_success`` …), and the figures of each request behind the scores."""

    scores: dict[str, Score]
    per_request: list[dict[str, float]]

    @classmethod
    def of(cls, per_request: Sequence[dict[str, float]], names: Iterable[str] | None = None) -> Evaluation:
        """Means of ``names``, each over the requests with that score.

        By default `SCORES`, and any of `FURTHER_SCORES` that some request has.
        """
        chosen = named(per_request, SCORES, FURTHER_SCORES) if names is None else names
        return cls({n: Score.of([r[n] for r in per_request if n in r]) for n in chosen}, list(per_request))

    def subset(self, indices: Iterable[int]) -> Evaluation:
        """The evaluation of some of the requests, in this order; the model is not run again."""
        return Evaluation.of([self.per_request[i] for i in indices], self.scores)

    def __or__(self, other: Evaluation) -> Evaluation:
        """Both evaluations of the same requests."""
        both = zip(self.per_request, other.per_request, strict=True)
        return Evaluation(self.scores | other.scores, [own | more for own, more in both])

    def to_dict(self) -> dict[str, Any]:
        return {name: score.to_dict() for name, score in self.scores.items()}


METRICS = ("efficacy", "generalization", "specificity")
FOLLOWING = ("portability", "multi_hop")  # consequences of edits; only in some data sets
SCORES = tuple(f"{metric}_{kind}" for metric in METRICS for kind in ("success", "accuracy"))
TOKEN_SCORES = tuple(f"{metric}_token_accuracy" for metric in (*METRICS, *FOLLOWING))
FOLLOWING_SCORES = tuple(f"{metric}_{kind}" for metric in FOLLOWING for kind in ("success", "accuracy"))
FURTHER_SCORES = (*FOLLOWING_SCORES, *TOKEN_SCORES)


def named(per_request: Sequence[Iterable[str]], always: Iterable[str], further: Iterable[str]) -> tuple[str, ...]:
    """Names of scores: ``always``, then each of ``further`` that some request has."""
    found = {name for record in per_request for name in record}
    return (*always, *(name for name in further if name in found))


class Question(NamedTuple):
    """A prompt, the right answer followed by aliases, and the answer to compare with, or None."""

    prompt: str
    answers: tuple[str, ...]
    other: str | None


def evaluate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score efficacy (the prompt), generalization (paraphrases), specificity (neighbourhood), and, if requests have
    them, portability and multi-hop questions: success, accuracy and token accuracy of each.

    Efficacy and generalization want ``target_new``. Specificity wants ``target_true``, or ``neighborhood_answers`` if a
    request has them. Portability and multi-hop questions want the first of their own answers. Success needs two
    targets: requests without ``target_true`` or ``multi_hop_true``, portability, and neighbourhoods with answers of
    their own count in accuracy only. ``n`` is the number of requests scored. A request's multi-hop questions are one
    question in several wordings, and the best counts, as in MQuAKE; for all other prompts the mean counts.

    Args:
        model: causal LM; run in evaluation mode, left unchanged.

    Source: token accuracy of zsRE, MEND and ROME (Mitchell et al., Meng et al. 2022); portability, EasyEdit (Yao et al.
    2023), which reports token accuracy; multi-hop questions, MQuAKE (Zhong et al. 2023), which scores written answers
    (see `answers`).
    """
    check_tokenizer(tokenizer)
    asked: dict[tuple[str, str], int] = {}

    def ask(prompt: str, target: str | None) -> int | None:
        return None if target is None else asked.setdefault((prompt, target), len(asked))

    wanted = [
        {name: [(ask(p, wants[0]), ask(p, other)) for p, wants, other in g] for name, g in questions(request).items()}
        for request in requests
    ]
    tokens = target_tokens(model, tokenizer, list(asked), progress)
    log_probs, correct = mean_log_probs(tokens), all_correct(tokens)
    per_request = []
    for places in wanted:
        record: dict[str, float] = {}
        for name, pairs in places.items():
            both = [(w, o) for w, o in pairs if w is not None and o is not None]
            own = [w for w, _ in pairs if w is not None]
            if both:
                record[f"{name}_success"] = together(name, [log_probs[w] > log_probs[o] for w, o in both])
            if own:
                record[f"{name}_accuracy"] = together(name, [correct[w] for w in own])
                shares = [sum(right for _, right in tokens[w]) / len(tokens[w]) for w in own]
                record[f"{name}_token_accuracy"] = together(name, shares)
        per_request.append(record)
    return Evaluation.of(per_request)


def questions(request: EditRequest) -> dict[str, list[Question]]:
    """The prompts and answers of a request, by metric."""
    r, new, true, own = request, request.target_new, request.target_true, request.neighborhood_answers
    local = own or (true,) * len(r.neighborhood)
    return {
        "efficacy": [Question(r.text, (new,), true)],
        "generalization": [Question(p, (new,), true) for p in r.paraphrases],
        "specificity": [
            Question(p, (a,), None if own else new) for p, a in zip(r.neighborhood, local, strict=True) if a
        ],
        "portability": [Question(p, a, None) for p, a in zip(r.portability, r.portability_answers, strict=True)],
        "multi_hop": [Question(p, r.multi_hop_answers, r.multi_hop_true) for p in r.multi_hop],
    }


def together(metric: str, values: Sequence[float]) -> float:
    """Combine the scores of a request's prompts: the best wording of a multi-hop question, otherwise the mean."""
    return float(max(values)) if metric == "multi_hop" else sum(values) / len(values)


def score_targets(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[bool]]:
    """For each (prompt, target): mean log-probability per target token, and whether every token is the argmax."""
    tokens = target_tokens(model, tokenizer, asked, progress)
    return mean_log_probs(tokens), all_correct(tokens)


TargetTokens = list[list[tuple[float, bool]]]


def mean_log_probs(tokens: TargetTokens) -> list[float]:
    return [math.fsum(value for value, _ in found) / len(found) for found in tokens]


def all_correct(tokens: TargetTokens) -> list[bool]:
    return [all(right for _, right in found) for found in tokens]


def target_tokens(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    progress: Callable[[int, int], None] | None = None,
) -> TargetTokens:
    """For each token of each (prompt, target): log-probability, and whether the token is the argmax.

    Each prompt runs once for all of its targets. The prompt's last position scores the first token of every target, and
    longer targets continue from the prompt's cached keys and values. A model that caches none, or other states besides,
    runs every row whole. Rows of similar length share a batch.
    """
    check_usable(model)
    rows = [encode(tokenizer, prompt, None, target) for prompt, target in asked]
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (row, (prompt, _)) in enumerate(zip(rows, asked, strict=True)):
        check_fits(model, row, prompt)
        of_prompt.setdefault(row.ids[: len(row.ids) - len(row.target) + 1], []).append(i)
    prompts = list(of_prompt)
    tokens: TargetTokens = [[] for _ in rows]
    done = 0
    with frozen(model), torch.no_grad(), compact_head(model):
        score = _score if keeps_only_keys(model) else _score_whole
        for batch in _batches([len(prompt) for prompt in prompts]):
            targets = [{i: rows[i].target for i in of_prompt[prompts[b]]} for b in batch]
            for i, found in score(model, [prompts[b] for b in batch], targets).items():
                tokens[i] = found
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    return tokens


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows by batch, shorter rows first; bounds are rows × longest and the padding within."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        padded = (len(batch) + 1) * lengths[i]
        tokens += lengths[i]
        if batch and (padded > _TOKENS_PER_BATCH or padded - tokens > _PADDING_PER_BATCH):
            yield batch
            batch, tokens = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch


def _score(
    model: Any, prompts: Sequence[Sequence[int]], targets: Sequence[dict[int, tuple[int, ...]]]
) -> dict[int, list[tuple[float, bool]]]:
    """Log-probability of each target token, and whether the token is the argmax, by the target's number.

    Args:
        prompts: token ids.
        targets: token ids of each prompt's targets, by the target's number.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = pad_left(prompts, device)
    longer = [(at, i) for at, group in enumerate(targets) for i, target in group.items() if len(target) > 1]
    out = model(**inputs, use_cache=bool(longer), **last_logits(model, 1))
    log_probs = out.logits[:, -1].float().log_softmax(-1)
    likeliest = log_probs.argmax(-1).tolist()
    found = {
        i: [(float(log_probs[at, target[0]]), likeliest[at] == target[0])]
        for at, group in enumerate(targets)
        for i, target in group.items()
    }
    for batch in _batches([len(targets[at][i]) - 1 for at, i in longer]):
        chosen = [longer[b] for b in batch]
        read = [targets[at][i][:-1] for at, i in chosen]
        width = max(map(len, read))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in read], device=device)
        new = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in read], device=device)
        which = torch.tensor([at for at, _ in chosen], device=device)
        mask = torch.cat([inputs["attention_mask"][which], new], 1)
        cache = copy.copy(out.past_key_values)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # shallow: tensors are replaced, not written
        cache.batch_select_indices(which)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -width:],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for (at, i), own in zip(chosen, logits, strict=True):
            found[i] += _read(own, targets[at][i][1:])
    return found


def _score_whole(
    model: Any, prompts: Sequence[Sequence[int]], targets: Sequence[dict[int, tuple[int, ...]]]
) -> dict[int, list[tuple[float, bool]]]:
    """`_score` for any causal model: run whole rows, padded on the right, where no earlier token sees the padding."""
    device = next(model.parameters()).device
    asked = [(i, len(prompts[at]) - 1, target) for at, group in enumerate(targets) for i, target in group.items()]
    rows = [[*prompts[at], *target[:-1]] for at, group in enumerate(targets) for target in group.values()]
    found = {}
    for batch in _batches([len(row) for row in rows]):
        longest, first = len(rows[batch[-1]]), min(asked[b][1] for b in batch)
        ids = torch.tensor([[*rows[b], *[0] * (longest - len(rows[b]))] for b in batch], device=device)
        logits = model(input_ids=ids, use_cache=False, **last_logits(model, longest - first)).logits[
            :, first - longest :
        ]
        for b, own in zip(batch, logits, strict=True):
            i, start, target = asked[b]
            found[i] = _read(own[start - first :], target)
    return found


def _read(logits: Tensor, target: Sequence[int]) -> list[tuple[float, bool]]:
    """Log-probability of each target token, and whether the token is the argmax, from logits ``[≥ tokens, ids]``."""
    wanted = torch.tensor(target, device=logits.device)
    own = logits[: len(target)].float().log_softmax(-1)
    picked, right = own.gather(1, wanted[:, None])[:, 0], own.argmax(-1) == wanted
    return list(zip(picked.tolist(), right.tolist(), strict=True))


def perplexity(model: Any, tokenizer: Any, text: str = "heldout", tokens: int = PERPLEXITY_TOKENS) -> float:
    """exp of the mean NLL per token over consecutive windows of a text.

    Args:
        text: ``heldout`` (the package's own), or the path of a text file.
        tokens: most tokens to read.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    check_usable(model)
    total, count = 0.0, 0
    device, width = next(model.parameters()).device, readable(model, _WINDOW)
    with frozen(model), torch.no_grad():
        keeps_only_keys(model)  # raises if the model adds columns
        for window in token_windows(tokenizer, text, width, tokens):
            ids = window.to(device)[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    if count == 0:
        raise ValueError(f"text {text!r} has fewer than two tokens; perplexity needs at least two")
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows past 709; such a model is broken
