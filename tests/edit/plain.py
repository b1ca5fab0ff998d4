"""Straightforward versions of what the loop does cleverly: one row at a time, whole passes, fp64, direct formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def subject_last(tokenizer: Any, template: str, subject: str) -> tuple[list[int], int]:
    """Token ids, and the index of the token in which the subject's last character lies."""
    end = template.index("{}") + len(subject)
    encoding = tokenizer(template.replace("{}", subject), return_offsets_mapping=True)
    return encoding["input_ids"], [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < end <= b][-1]


@torch.no_grad()
def key_and_value(model, tokenizer, structure, request, context: str, layer: int, last: int) -> tuple[Tensor, Tensor]:
    """(key of ``layer``, output of block ``last``) at the subject's last token, from one whole forward pass."""
    ids, at = subject_last(tokenizer, context.replace("{}", request.prompt), request.subject)
    seen = {}
    handles = [
        structure.down[layer].module.register_forward_pre_hook(lambda _, args: seen.update(key=args[0])),
        structure.blocks[last].register_forward_hook(
            lambda _, __, out: seen.update(value=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen["key"].view(1, len(ids), -1)[0, at], seen["value"][0, at]  # OPT's keys come flattened


def keys_and_values(model, tokenizer, structure, requests, contexts, layer: int, last: int) -> tuple[Tensor, Tensor]:
    """Keys ``[facts, d]`` (half the bare prompt's, half the mean of the contexts') and bare values ``[facts, n]``."""
    keys, values = [], []
    for request in requests:
        found = [key_and_value(model, tokenizer, structure, request, c, layer, last) for c in contexts]
        rest = [key for key, _ in found[1:]]
        keys.append((found[0][0] + sum(rest) / len(rest)) / 2 if rest else found[0][0])
        values.append(found[0][1])
    return torch.stack(keys), torch.stack(values)


def energy(weight: Tensor, s: float = 1.0) -> float:
    """Hyperspherical energy over ordered pairs, in fp64, distances formed directly."""
    w = weight.double()
    w = w / (w.norm(dim=1, keepdim=True) + 1e-8)
    t = (w[:, None] - w[None]).norm(dim=2)
    t = t[~torch.eye(len(w), dtype=torch.bool)]
    return float(t.pow(-s).sum() if s else -t.log().sum())


def principal_projector(weight: Tensor, energy_ratio: float) -> Tensor:
    """``U Uᵀ [d, d]`` of ``ŴᵀŴ/n``, in fp64."""
    w = weight.double()
    w = w / (w.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(w.T @ w / len(w))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values.cumsum(0) / values.sum() <= energy_ratio).sum()) + 1
    return vectors[:, :rank] @ vectors[:, :rank].T


def alphaedit(projector: Tensor, history: Tensor, ridge: float, keys: Tensor, residuals: Tensor) -> Tensor:
    """``Δ [n, d]`` of ``(P(KKᵀ + C) + λI) Δᵀ = P K Rᵀ`` with ``K = keysᵀ [d, b]``, ``R = residualsᵀ [n, b]``."""
    k, r = keys.double().T, residuals.double().T
    system = projector @ (k @ k.T + history) + ridge * torch.eye(len(k), dtype=torch.float64)
    return torch.linalg.solve(system, projector @ k @ r.T).T


def target_nll(model, tokenizer, facts) -> Tensor:
    """Mean negative log-likelihood of each fact's target tokens after its bare prompt, ``[facts]``."""
    found = []
    for fact in facts:
        prompt = tokenizer(fact.text)["input_ids"]
        whole = tokenizer(f"{fact.text} {fact.target_new}")["input_ids"]
        assert whole[: len(prompt)] == prompt
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(-torch.stack([log_probs[i - 1, whole[i]] for i in range(len(prompt), len(whole))]).mean())
    return torch.stack(found)
