"""Optimise the values: what the last edited layer should say at a subject so that the model then says the target.

All facts of a batch are optimised together. The hidden states at the edited layer and everything before the subject's
last token are computed once; each step runs only the blocks above, on the few tokens from the subject on, and the
head only where the loss reads it. Rows are grouped by that number of tokens, so nothing is padded; facts that are
done leave their groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import EditConfig
from sphere_edit.contexts import in_context
from sphere_edit.replay import record_after_prefix
from sphere_edit.requests import EditRequest
from sphere_edit.structure import ModelStructure
from sphere_edit.targets.groups import Group
from sphere_edit.tokens import Row, encode

_ROWS_PER_GROUP = 96  # bounds the activations that a backward pass keeps
_SHRINK = 0.8  # a group is cut down once this share of its rows, or less, is still wanted


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch of facts, in fp32 on the model's device.

    Args:
        target: ``[facts, hidden]``, the wanted output of the last edited layer at the subject's last token.
        loss: ``[facts]``, the last loss (NLL + KL + weight decay), fp32.
        nll: ``[facts]``, its first part: mean negative log-likelihood of a target token over the contexts, in nats.
        steps: ``[facts]``, evaluations of the loss that each fact took.
    """

    target: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor


@torch.enable_grad()
def optimise_values(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    layer: int,
    progress: Callable[[int, int], None] | None = None,
) -> Values:
    """Find, for every request, the output of block ``layer`` at the subject's last token that yields the new target.

    Minimises, per fact, with Adam: the mean NLL of the target over the context prefixes, plus ``value_kl`` times the KL
    divergence at the subject's last token of "{subject} is a", plus ``value_weight_decay · ‖δ‖/‖z₀‖²``; ‖δ‖ is clamped
    to ``value_clamp · ‖z₀‖``. A fact stops when its loss is below ``value_stop`` or after ``value_steps`` evaluations.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `replay.frozen`).
        contexts: templates with ``{}``; the first is the bare prompt, which gives z₀.
        layer: the last edited block.
        progress: called with (steps, steps at most) after every step.

    Source: MEMIT's ``compute_z``, as AlphaEdit and SPHERE use it.
    """
    groups, start = _prepare(model, tokenizer, structure, requests, contexts, config, layer)
    facts = len(requests)
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.value_lr)
    norm = start.norm(dim=1)
    final = torch.zeros_like(start)
    loss_out, nll_out = torch.zeros_like(norm), torch.zeros_like(norm)
    steps = torch.zeros(facts, dtype=torch.long, device=start.device)
    active = torch.ones(facts, dtype=torch.bool, device=start.device)
    for step in range(config.value_steps):
        last = step == config.value_steps - 1
        adam.zero_grad()
        nll, kl = torch.zeros_like(norm), torch.zeros_like(norm)
        for group in groups:
            nll_part, kl_part = _group_loss(structure, group, delta, facts)
            if not last:
                (nll_part + config.value_kl * kl_part)[active].sum().backward()
            nll += nll_part.detach()
            kl += kl_part.detach()
        decay = config.value_weight_decay * _norm(delta) / norm**2
        loss = nll + config.value_kl * kl + decay.detach()
        done = active & ((loss if config.value_stop_on == "loss" else nll) < config.value_stop)
        done = active.clone() if last else done
        final[done], loss_out[done], nll_out[done] = start[done] + delta.detach()[done], loss[done], nll[done]
        steps[active] += 1
        active &= ~done
        finished = not active.any()
        if progress is not None:
            progress(config.value_steps if finished else step + 1, config.value_steps)
        if finished:
            break
        decay[active].sum().backward()
        adam.step()
        with torch.no_grad():
            limit = config.value_clamp * norm
            delta *= (limit / delta.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)[:, None]
        if done.any():
            groups = [kept for group in groups if (kept := group.wanted(active, _SHRINK)) is not None]
    return Values(final, loss_out, nll_out, steps)


def _prepare(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    layer: int,
) -> tuple[list[Group], Tensor]:
    """Group the rows by tokens to replay; also z₀ ``[facts, hidden]`` from the bare prompts."""
    by_length: dict[int, list[tuple[int, bool, Row]]] = defaultdict(list)
    for fact, request in enumerate(requests):
        for i, context in enumerate(contexts):
            row = encode(tokenizer, in_context(context, request.prompt), request.subject, request.target_new)
            by_length[len(row.ids) - row.subject_last].append((fact, i == 0, row))
        essence = encode(tokenizer, "{} is a", request.subject)
        by_length[1].append((fact, False, Row(essence.ids[: essence.subject_last + 1], essence.subject_last)))
    start = torch.zeros(len(requests), structure.hidden_size, device=structure.device)
    groups = []
    for length in sorted(by_length):
        rows = sorted(by_length[length], key=lambda item: item[2].subject_last)  # prefixes of like length together
        for at in range(0, len(rows), _ROWS_PER_GROUP):
            part = rows[at : at + _ROWS_PER_GROUP]
            group = _make_group(model, structure, part, len(contexts), layer)
            for i, (fact, bare, _) in enumerate(part):
                if bare:
                    start[fact] = group.replay.hidden[i, 0].float()
            groups.append(group)
    return groups, start


def _make_group(
    model: Any, structure: ModelStructure, part: Sequence[tuple[int, bool, Row]], contexts: int, layer: int
) -> Group:
    rows = [r for _, _, r in part]
    replay = record_after_prefix(
        model, structure, [r.ids for r in rows], [r.subject_last for r in rows], layer + 1, len(structure.blocks) - 1
    )
    return Group.of(structure, replay, [fact for fact, _, _ in part], rows, contexts)


def _group_loss(structure: ModelStructure, group: Group, delta: Tensor, facts: int) -> tuple[Tensor, Tensor]:
    """This group's share of each fact's NLL and KL, ``[facts]`` each."""
    hidden = group.replay.hidden
    shift = delta[group.row_fact].to(hidden.dtype)
    hidden = torch.cat([hidden[:, :1] + shift[:, None], hidden[:, 1:]], 1)
    return group.losses(group.log_probs(structure, hidden), facts)


def _norm(x: Tensor) -> Tensor:
    """Row norms whose gradient at zero is zero."""
    return (x.square().sum(1) + 1e-30).sqrt()
