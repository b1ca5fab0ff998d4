"""Optimise values: find the outputs of the last edited layer at a subject that make the model say the target.

All facts of a batch are optimised together. The hidden states at the edited layer, and everything before the subject's
last token, are computed once. Each step runs only the blocks above, on the few tokens from the subject's last one on,
and runs the head only where the loss reads it. Rows are grouped by that number of tokens, so nothing is padded. Facts
leave their groups when they are done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import (
    ConfigError,
    EditConfig,
    below_one,
    choice,
    count,
    not_negative,
    positive,
    positive_int,
)
from sphere_edit.data.requests import EditRequest
from sphere_edit.model.partial_forward import keeps_only_keys, record_after_prefix
from sphere_edit.model.structure import LinearMap, ModelStructure
from sphere_edit.model.tokens import Row, encode
from sphere_edit.targets.base import Targets
from sphere_edit.targets.contexts import in_context
from sphere_edit.targets.groups import Group, essence
from sphere_edit.targets.places import AtBlock, AtMaps, Bare

_ROWS_PER_GROUP = 96  # bounds the activations that a backward pass keeps
_SHRINK = 0.8  # a group is cut down once at most this share of its rows is active
_MORE_STEPS = 2  # after the first step in which the target is the likeliest (ENCORE)


def _check(config: EditConfig) -> None:
    if config.modules != "down":
        raise ConfigError(
            "modules: optimised values are outputs of the down-projection; expected 'down', or other targets, got "
            f"{config.modules!r}"
        )


Targets(
    settings={
        "value_steps": positive_int(25, "Steps of Adam on each fact's value."),
        "value_lr": positive(0.5, "Learning rate of Adam on the value."),
        "value_weight_decay": not_negative(1e-3, "Weight of the value's decay in the loss."),
        "value_kl": not_negative(0.0625, 'Weight of the KL divergence of "{subject} is a" in the loss.'),
        "value_clamp": positive(4.0, "Longest change of the value, in units of the hidden state's norm."),
        "value_beta1": below_one(0.9, "Adam's first decay rate."),
        "value_beta2": below_one(0.999, "Adam's second decay rate."),
        "value_stop": not_negative(0.05, "A fact is done when its loss falls below this."),
        "value_stop_on": choice(
            "loss",
            "The loss of value_stop. loss: NLL + KL + decay (published). nll: NLL alone. argmax: instead, a fact is "
            "done two steps after every token of its target became the likeliest in all contexts, whatever value_stop.",
            ("loss", "nll", "argmax"),
        ),
        "value_anchor": count(
            0,
            "Number of other facts (world-facts). Values are scaled to the length that the values of these facts have "
            "in the model before all edits, and given up beyond twice that (NAS, whose code takes 1,000 facts; see "
            "`sphere_edit.targets.anchor`). 0: values stay as they are. A resumed run measures the length anew.",
        ),
    },
    presets={
        "llama3-8b": {"value_lr": 0.1, "value_weight_decay": 0.5, "value_clamp": 0.75},
        "gpt2-xl": {"value_steps": 20, "value_weight_decay": 0.5, "value_clamp": 0.75},
        "gpt-j-6b": {"value_weight_decay": 0.5, "value_clamp": 0.75},
        # Chosen by measurement (benchmarks/preset.py). The values of a small model need a large clamp and step to reach
        # their targets; stopping at the NLL, not the whole loss, spares the neighbours.
        "smollm2-135m": {"value_stop": 0.1, "value_stop_on": "nll", "contexts": 5, "ridge": 10.0},
    },
    check=_check,
).register("optimised")


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch of facts, in fp32 on the model's device.

    Args:
        target: ``[facts, hidden]``, the wanted output of the last edited layer at the subject's last token; with values
            of the edited maps, the wanted output of the last map.
        loss: ``[facts]``, the last loss (NLL + KL + weight decay), fp32.
        nll: ``[facts]``, the first part of the loss: mean negative log-likelihood of a target token over the contexts,
            in nats.
        steps: ``[facts]``, evaluations of the loss per fact.
        start: ``[facts, hidden]``, the output before any change, at the place of ``target``.
        outputs: ``{layer: [facts, n]}``, the wanted outputs of the edited maps; empty with values of the block.
    """

    target: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor
    start: Tensor
    outputs: dict[int, Tensor]


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
    maps: Sequence[LinearMap] = (),
) -> Values:
    """Find, for every request, the output of block ``layer`` at the subject's last token that yields the new target.

    Adam minimises, per fact, the mean NLL of the target over the context prefixes, plus ``value_kl`` times the KL
    divergence at the subject's last token of "{subject} is a", plus ``value_weight_decay · ‖δ‖/‖z₀‖²``; ‖δ‖ is clamped
    to ``value_clamp · ‖z₀‖``. A fact stops when its loss is below ``value_stop`` or after ``value_steps`` evaluations.
    With ``value_stop_on: argmax`` it stops at the third evaluation in which all its target tokens are the likeliest.

    Args:
        model: causal LM in evaluation mode without parameter gradients (see `sphere_edit.model.inference.frozen`).
        contexts: templates with ``{}``; the first is the bare prompt, which gives z₀.
        layer: the last edited block.
        progress: called with (steps, steps at most) after every step.
        maps: the edited maps, ascending, if blocks do not add their outputs unchanged (see
            `sphere_edit.model.partial_forward.not_additive`). Each map then has a value, and all values are optimised
            together; see `places.AtMaps`.

    Source: MEMIT's ``compute_z``, as AlphaEdit and SPHERE use it.
    """
    place = AtMaps(structure, maps) if maps else AtBlock(structure, layer)
    facts = len(requests)
    groups, bare = _prepare(model, tokenizer, structure, requests, contexts, place.first)
    place.begin(bare, facts)
    delta = torch.zeros_like(place.start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.value_lr, betas=(config.value_beta1, config.value_beta2))
    norm = place.norm
    final = torch.zeros_like(place.start)
    loss_out, nll_out, likeliest = (torch.zeros_like(norm[:, 0]) for _ in range(3))
    steps = torch.zeros(facts, dtype=torch.long, device=norm.device)
    active = torch.ones(facts, dtype=torch.bool, device=norm.device)
    for step in range(config.value_steps):
        last = step == config.value_steps - 1
        adam.zero_grad()
        nll, kl, misses = (torch.zeros_like(norm[:, 0]) for _ in range(3))
        for group in groups:
            log_probs = place.log_probs(group, delta)
            nll_part, kl_part = group.losses(log_probs, facts)
            if not last:
                (nll_part + config.value_kl * kl_part)[active].sum().backward()
            nll += nll_part.detach()
            kl += kl_part.detach()
            if config.value_stop_on == "argmax":
                misses += group.misses(log_probs.detach(), facts)
        decay = (config.value_weight_decay * _norm(delta) / norm**2).mean(1)
        loss = nll + config.value_kl * kl + decay.detach()
        likeliest += misses == 0
        stops = {"loss": loss < config.value_stop, "nll": nll < config.value_stop}
        stops["argmax"] = (misses == 0) & (likeliest > _MORE_STEPS)
        done = active & stops[config.value_stop_on]
        done = active.clone() if last else done
        final[done], loss_out[done], nll_out[done] = delta.detach()[done], loss[done], nll[done]
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
            delta *= (limit / delta.norm(dim=2).clamp_min(1e-30)).clamp_max(1.0)[:, :, None]
        if done.any():
            groups = [kept for group in groups if (kept := group.wanted(active, _SHRINK)) is not None]
    target = place.said(final)
    outputs = {m.layer: target[:, i] for i, m in enumerate(maps)}
    return Values(target[:, -1], loss_out, nll_out, steps, place.start[:, -1], outputs)


def _prepare(
    model: Any,
    tokenizer: Any,
    structure: ModelStructure,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    first: int,
) -> tuple[list[Group], list[Bare]]:
    """Group the rows by number of tokens to replay, from block ``first`` on; also return the bare prompts' rows."""
    by_length: dict[int, list[tuple[int, bool, Row]]] = defaultdict(list)
    for fact, request in enumerate(requests):
        for i, context in enumerate(contexts):
            row = encode(tokenizer, in_context(context, request.prompt), request.subject, request.target_new)
            by_length[len(row.ids) - row.subject_last].append((fact, i == 0, row))
        by_length[1].append((fact, False, essence(tokenizer, request.subject)))
    groups, all_bare = [], []
    cached = keeps_only_keys(model)
    for length in sorted(by_length):
        rows = sorted(by_length[length], key=lambda item: item[2].subject_last)  # prefixes of similar length together
        for at in range(0, len(rows), _ROWS_PER_GROUP):
            part = rows[at : at + _ROWS_PER_GROUP]
            group = _make_group(model, structure, part, len(contexts), first, cached)
            bare = [i for i, item in enumerate(part) if item[1]]
            if bare:
                all_bare.append(Bare(group, bare, [part[i][0] for i in bare]))
            groups.append(group)
    return groups, all_bare


def _make_group(
    model: Any,
    structure: ModelStructure,
    part: Sequence[tuple[int, bool, Row]],
    contexts: int,
    first: int,
    cached: bool,
) -> Group:
    rows, last = [r for _, _, r in part], len(structure.blocks) - 1
    ids, split = [r.ids for r in rows], [r.subject_last for r in rows]
    replay = record_after_prefix(model, structure, ids, split, first, last, cached)
    return Group.of(structure, replay, [fact for fact, _, _ in part], rows, contexts)


def _norm(x: Tensor) -> Tensor:
    """Norms over the last dimension; their gradient at zero is zero."""
    return (x.square().sum(-1) + 1e-30).sqrt()
