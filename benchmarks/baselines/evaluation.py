"""Scores of edits the published way: one forward pass per prompt and target; and answers, one prompt at a time.

Written from the description of CounterFact's and zsRE's scores in ROME and MEMIT: mean log-probability of a target's
tokens, and the argmax at each token. The scores are those of `sphere_edit.evaluation.metrics.evaluate`; only the way of
computing differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from sphere_edit.data.requests import EditRequest

Pairs = dict[tuple[str, str], tuple[float, float]]


def evaluate_one_by_one(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest]
) -> tuple[list[dict[str, float]], Pairs]:
    """Scores of each request, and the result of `score` for each pair; every request must have a true target."""
    pairs: Pairs = {}
    per_request = []
    for r in requests:
        assert r.target_true is not None and not r.neighborhood_answers
        record = {}
        for name, prompts, want, other in (
            ("efficacy", (r.text,), r.target_new, r.target_true),
            ("generalization", r.paraphrases, r.target_new, r.target_true),
            ("specificity", r.neighborhood, r.target_true, r.target_new),
        ):
            found = [[score(model, tokenizer, p, target) for target in (want, other)] for p in prompts]
            for prompt, both in zip(prompts, found, strict=True):
                pairs |= {(prompt, want): both[0], (prompt, other): both[1]}
            if found:
                record[f"{name}_success"] = mean(wanted[0] > another[0] for wanted, another in found)
                record[f"{name}_accuracy"] = mean(wanted[1] == 1 for wanted, _ in found)
                record[f"{name}_token_accuracy"] = mean(wanted[1] for wanted, _ in found)
        per_request.append(record)
    return per_request, pairs


@torch.no_grad()
def score(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[float, float]:
    """(mean log-probability, share of argmax tokens) of the target after prompt and blank, in one pass."""
    ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
    first = len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=ids).logits[0, first - 1 : -1]
    picked = logits.log_softmax(-1).gather(1, ids[0, first:, None])
    return float(picked.mean()), float((logits.argmax(-1) == ids[0, first:]).double().mean())


@torch.no_grad()
def answer_one_by_one(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy answers to the end of line or text, by transformers, one prompt at a time, with cache."""
    answers = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **given,
            max_new_tokens=tokens,
            do_sample=False,
            stop_strings="\n",
            tokenizer=tokenizer,
            pad_token_id=tokenizer.eos_token_id,
        )
        said = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(said.partition("\n")[0].strip())
    return answers
