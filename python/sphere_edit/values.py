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
from sphere_edit.replay import Replay, record_after_prefix
from sphere_edit.requests import EditRequest
from sphere_edit.structure import ModelStructure
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


@dataclass
class _Group:
    """Rows with equally many tokens from the subject on.

    ``read`` are the (row, column) places whose logits matter, flattened; ``want`` the token each should predict, or -1
    where the KL term reads the distribution; ``fact`` the fact of each place, ``weight`` its share in the fact's loss.
    """

    replay: Replay
    row_fact: Tensor
    read_row: Tensor
    read_column: Tensor
    want: Tensor
    weight: Tensor
    reference: Tensor | None = None  # log-probabilities at the KL places before any change

    def rows(self, keep: Tensor) -> _Group:
        place = torch.full((len(self.row_fact),), -1, dtype=torch.long, device=keep.device)
        place[keep] = torch.arange(len(keep), device=keep.device)
        read = place[self.read_row] >= 0
        reference = None if self.reference is None else self.reference[read[self.want < 0]]
        return _Group(
            self.replay.rows(keep),
            self.row_fact[keep],
            place[self.read_row[read]],
            self.read_column[read],
            self.want[read],
            self.weight[read],
            reference,
        )


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
            groups = [kept for group in groups if (kept := _shrink(group, active)) is not None]
    return Values(final, loss_out, nll_out, steps)


def _prepare(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    layer: int,
) -> tuple[list[_Group], Tensor]:
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
    for group in groups:
        kl = group.want < 0
        if kl.any():
            with torch.no_grad():
                group.reference = _log_probs(structure, group, group.replay.hidden)[kl]
    return groups, start


def _make_group(
    model: Any, structure: ModelStructure, part: Sequence[tuple[int, bool, Row]], contexts: int, layer: int
) -> _Group:
    rows = [r for _, _, r in part]
    replay = record_after_prefix(
        model, structure, [r.ids for r in rows], [r.subject_last for r in rows], layer + 1, len(structure.blocks) - 1
    )
    places = []
    for i, r in enumerate(rows):
        if r.target:
            first = len(r.ids) - len(r.target) - r.subject_last
            places += [(i, first + k, token, 1 / (contexts * len(r.target))) for k, token in enumerate(r.target)]
        else:
            places.append((i, 0, -1, 1.0))
    device = structure.device
    row, column, want = (torch.tensor(x, device=device) for x in list(zip(*places, strict=True))[:3])
    weight = torch.tensor([p[3] for p in places], device=device)
    return _Group(replay, torch.tensor([fact for fact, _, _ in part], device=device), row, column, want, weight)


def _log_probs(structure: ModelStructure, group: _Group, hidden: Tensor) -> Tensor:
    """``[places, vocabulary]`` log-probabilities, fp32, after the blocks above the edited layer."""
    out = group.replay.run(hidden)[group.read_row, group.read_column]
    return structure.logits(out).float().log_softmax(-1)


def _group_loss(structure: ModelStructure, group: _Group, delta: Tensor, facts: int) -> tuple[Tensor, Tensor]:
    """This group's share of each fact's NLL and KL, ``[facts]`` each."""
    hidden = group.replay.hidden
    shift = delta[group.row_fact].to(hidden.dtype)
    hidden = torch.cat([hidden[:, :1] + shift[:, None], hidden[:, 1:]], 1)
    log_probs = _log_probs(structure, group, hidden)
    fact = group.row_fact[group.read_row]
    zero = torch.zeros(facts, device=delta.device)
    targets, kl = group.want >= 0, group.want < 0
    picked = log_probs[targets].gather(1, group.want[targets][:, None])[:, 0]
    nll = zero.index_add(0, fact[targets], -picked * group.weight[targets])
    if group.reference is None:
        return nll, zero
    now = log_probs[kl]
    divergence = (now.exp() * (now - group.reference)).sum(1)
    return nll, zero.index_add(0, fact[kl], divergence)


def _shrink(group: _Group, active: Tensor) -> _Group | None:
    wanted = active[group.row_fact]
    count = int(wanted.sum())
    if count == 0:
        return None
    worth = count <= _SHRINK * len(wanted) and group.replay.can_cut
    return group.rows(wanted.nonzero()[:, 0]) if worth else group


def _norm(x: Tensor) -> Tensor:
    """Row norms whose gradient at zero is zero."""
    return (x.square().sum(1) + 1e-30).sqrt()
