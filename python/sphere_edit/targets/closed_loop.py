"""Find the wanted changes of a batch in rounds, through the weights that are written for them.

A round starts with a forward and backward pass under the present weights. For each fact it gives the likelihood of the
target and, for each edited map, the direction in which the map's output should move at the subject's last token. The
wanted changes move in that direction. The method solves for all changes anew, SPHERE projects, the weights are written,
and the next round sees the effect. The null space or SPHERE may remove part of a change, other facts may disturb it, a
norm after the MLP may alter it: the missing part shows in the next round's loss and is asked for again. A batch remains
one update, the last round's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.config import EditConfig, choice, not_negative, positive, positive_int, share
from sphere_edit.data.requests import EditRequest
from sphere_edit.model.tokens import Row, encode
from sphere_edit.targets.base import Targets, all_at_once
from sphere_edit.targets.contexts import in_context
from sphere_edit.targets.groups import essence
from sphere_edit.targets.passes import Passes, Seen
from sphere_edit.targets.plain import Plain, learned

Asked = dict[int, tuple[Tensor, Tensor]]  # by layer: keys [facts, d] and wanted changes [facts, n]


Targets(
    settings={
        "loop_rounds": positive_int(
            8, "The most forward and backward passes per batch; a fact takes part until it is known."
        ),
        "loop_step": positive(
            1.0,
            "h: the longest step of a fact's wanted change at a layer, in units of the layer's mean output length over "
            "the root of the number of layers.",
        ),
        "loop_reach": positive(
            2.0,
            "A fact's step is this many times as long as a straight line to loop_stop would take it, and at most "
            "loop_step.",
        ),
        "loop_momentum": share(0.3, "The share of a round's direction that the next round keeps."),
        "loop_stop": positive(0.1, "A fact is known when the mean NLL of its target's tokens falls below this."),
        "loop_kl": not_negative(
            0.0, 'Weight of the KL divergence of "{subject} is a" from the model before the batch.'
        ),
        "loop_arithmetic": choice(
            "auto",
            "Arithmetic of the rounds. model: the model's own. bfloat16: in a copy of the model, kept for the rounds. "
            "auto: the copy on processors that multiply bfloat16. Updates are fp32, and a forward pass of the model "
            "itself reports.",
            ("auto", "model", "bfloat16"),
        ),
    },
    presets={"gemma3-270m": {"loop_step": 0.5}},
    check=all_at_once,
).register("closed_loop")


@dataclass(frozen=True)
class Loop:
    """Result of a batch's rounds.

    Attributes:
        plain: result of a forward pass of the model itself after the last write.
        rounds: ``[facts]`` int64, forward and backward passes of each fact.
        wanted: ``{layer: [facts, n]}`` fp32, the changes of the last solve.
        flops: floating-point operations of the linear maps in all passes.
    """

    plain: Plain
    rounds: Tensor
    wanted: dict[int, Tensor]
    flops: float


def close_loop(
    passes: Passes,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    config: EditConfig,
    batch: int,
    write: Callable[[Asked], None],
    look: Callable[[Sequence[Row]], Plain],
    progress: Callable[[int, int], None] | None = None,
) -> Loop:
    """Write updates until every fact is known or ``loop_rounds`` passes are used up.

    Per fact and edited map, with g the gradient of its loss and s the mean output length over the batch in the
    first round: a direction ``u ← m u + g / ‖g‖`` and a wanted change ``v ← v − c s u / √layers``. The step c is
    ``loop_reach`` times the length of a straight line to half of ``loop_stop``, at most ``loop_step``; each rise of the
    fact's loss halves it. A fact takes part until its NLL is below ``loop_stop``. Then its change stays as it is (0 if
    the model knew the fact before) and stays in the solve with the fact's last key. At the end `look` asks the model
    itself. Facts that the model does not have take part again while there are rounds left.

    Args:
        contexts: templates with ``{}``, the first the bare prompt. With more, each later round draws one anew, and a
            fact's key is the mean over its rounds.
        batch: number of the batch; it seeds the draw.
        write: writes the update for keys and wanted changes, each by layer, into the model and replaces the update of
            the round before.
        look: asks the model itself for the targets of the bare prompts.
        progress: called with (facts known, facts).

    Raises:
        FloatingPointError: from ``write``, where a loss or gradient is not finite.
    """
    facts, layers = len(requests), config.layers
    drawn = torch.Generator().manual_seed((config.seed * 1_000_003 + batch) % 2**63)
    bare = [encode(tokenizer, request.prompt, request.subject, request.target_new) for request in requests]
    active = torch.ones(facts, dtype=torch.bool)
    rounds = torch.zeros(facts, dtype=torch.long)
    steps: _Steps | None = None
    plain, round_number, begun, flops = None, 0, False, -passes.flops
    while active.any() and round_number < config.loop_rounds:
        if not begun or len(contexts) > 1:
            context = contexts[int(torch.randint(len(contexts), (), generator=drawn)) if round_number else 0]
            rows = _rows(tokenizer, requests, bare, context, active, config.loop_kl > 0)
            passes.begin(rows, facts)
            begun = True
        passes.keep(active.to(passes.device))
        seen = passes.run(config.loop_kl)
        steps = steps or _Steps(seen, config, len(contexts) > 1)
        steps.see(seen)
        rounds += seen.ran.cpu()
        round_number += 1
        unknown = active.to(passes.device) & ~(seen.nll < config.loop_stop)
        if unknown.any():
            steps.move(seen, unknown)
        if unknown.any() or round_number == 1:
            write({layer: (steps.keys[layer], steps.wanted[layer]) for layer in layers})
        active = unknown.cpu()
        if not active.any() or round_number == config.loop_rounds:
            plain = look(bare)
            flops += plain.flops
            active = ~plain.known
            begun = False
        if progress is not None:
            progress(facts - int(active.sum()), facts)
    assert steps is not None and plain is not None
    return Loop(plain, rounds, steps.wanted, flops + passes.flops)


class _Steps:
    """Keys, wanted changes and the state of the steps, by layer or by fact."""

    def __init__(self, first: Seen, config: EditConfig, averaged: bool) -> None:
        self._config, self._averaged = config, averaged
        root = len(config.layers) ** 0.5
        self._unit = {layer: length.mean() / root for layer, length in first.lengths.items()}
        self.keys = {layer: torch.zeros_like(keys) for layer, keys in first.keys.items()}
        self.wanted = {layer: torch.zeros_like(gradient) for layer, gradient in first.gradients.items()}
        self._direction = {layer: torch.zeros_like(gradient) for layer, gradient in first.gradients.items()}
        self._before = torch.full_like(first.nll, torch.inf)
        self._caution = torch.ones_like(first.nll)
        self._times = torch.zeros_like(first.nll)

    def see(self, seen: Seen) -> None:
        """Take the keys of the facts that ran."""
        self._times[seen.ran] += 1
        for layer, keys in self.keys.items():
            new = seen.keys[layer][seen.ran]
            share = 1 / self._times[seen.ran, None] if self._averaged else 1.0
            keys[seen.ran] += share * (new - keys[seen.ran])

    def move(self, seen: Seen, unknown: Tensor) -> None:
        """Make one step for the facts in ``unknown``, ``[facts]`` bool."""
        config = self._config
        self._caution[unknown & (seen.nll > self._before)] *= 0.5
        self._before = torch.where(unknown, seen.nll, self._before)
        norms = {layer: gradient.norm(dim=1) for layer, gradient in seen.gradients.items()}
        slope = sum((norm * self._unit[layer] for layer, norm in norms.items()), torch.zeros_like(seen.nll))
        straight = (seen.nll - config.loop_stop / 2) / slope.clamp_min(1e-30)
        step = self._caution * (config.loop_reach * straight).clamp(max=config.loop_step)
        for layer, gradient in seen.gradients.items():
            toward = gradient / norms[layer].clamp_min(1e-30)[:, None]
            direction = config.loop_momentum * self._direction[layer] + toward
            self._direction[layer] = torch.where(unknown[:, None], direction, self._direction[layer])
            self.wanted[layer][unknown] -= (step[:, None] * self._unit[layer] * direction)[unknown]


def _rows(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    bare: Sequence[Row],
    context: str,
    active: Tensor,
    kl: bool,
) -> list[tuple[int, Row]]:
    """(fact, row) of the active facts in a context; with ``kl``, the rows of the KL term too."""
    rows = []
    for fact, request in enumerate(requests):
        if not active[fact]:
            continue
        row = bare[fact]
        if context != "{}":
            row = encode(tokenizer, in_context(context, request.prompt), request.subject, request.target_new)
        rows.append((fact, row))
        if kl:
            rows.append((fact, essence(tokenizer, request.subject)))
    return rows


def told(loop: Loop, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """The fields of a batch's event that describe its rounds."""
    nll = loop.plain.nll
    return {
        "nll": float(nll.mean()),
        "fact_nll": [round(value, 4) for value in nll.tolist()],
        "steps": float(loop.rounds.float().mean()),
        "rounds": int(loop.rounds.max()),
        **learned(loop.plain, requests),
        "flops": loop.flops,
    }
