"""Places of values: the output of the last edited block, or the edited maps' own outputs.

A block that adds its map's output unchanged moves as its map moves. Then one value of the block's output is enough, and
every edited layer takes a share of it. Where a norm, a multiplier or an adapter comes between, no share is known. There
each edited map has a value of its own, at its own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.model.partial_forward import added
from sphere_edit.model.structure import LinearMap, ModelStructure
from sphere_edit.targets.groups import Group


@dataclass(frozen=True)
class Bare:
    """The rows of a group that are bare prompts, ``rows``, and their facts, ``facts``."""

    group: Group
    rows: list[int]
    facts: list[int]


class AtBlock:
    """Values are outputs of block ``layer``.

    Attributes:
        first: the first block that is replayed.
        start: ``[facts, 1, hidden]`` fp32, the output before any change, at the bare prompts.
        norm: ``[facts, 1]``, the length of that output.
    """

    def __init__(self, structure: ModelStructure, layer: int) -> None:
        self._structure, self.first = structure, layer + 1

    def begin(self, bare: Sequence[Bare], facts: int) -> None:
        shape = facts, 1, self._structure.hidden_size
        self.start = torch.zeros(shape, dtype=torch.float32, device=self._structure.device)
        for part in bare:
            self.start[part.facts, 0] = part.group.replay.hidden[part.rows, part.group.replay.column].float()
        self.norm = self.start.norm(dim=2)

    def log_probs(self, group: Group, delta: Tensor) -> Tensor:
        """`Group.log_probs` with ``delta`` ``[facts, 1, hidden]`` added."""
        hidden, at = group.replay.hidden, group.replay.column
        shift = delta[group.row_fact, 0].to(hidden.dtype)
        parts = hidden[:, :at], hidden[:, at : at + 1] + shift[:, None], hidden[:, at + 1 :]
        return group.log_probs(self._structure, torch.cat(parts, 1))

    def said(self, delta: Tensor) -> Tensor:
        """The outputs with ``delta`` added, ``[facts, 1, hidden]``."""
        return self.start + delta


class AtMaps:
    """Values are outputs of the edited maps, all at once.

    A change is in units of the block's output: the change times ``‖y‖ / ‖z‖`` is added to the map's output ``y``, with
    ``z`` the block's output, both before any change. Steps, clamp and decay therefore mean the same as in `AtBlock`,
    and a model with its multipliers moved into its weights takes the same steps.

    Attributes:
        first: the first block that is replayed.
        start: ``[facts, maps, n]`` fp32, the maps' outputs before any change, at the bare prompts.
        norm: ``[facts, maps]``, lengths of the blocks' outputs.
    """

    def __init__(self, structure: ModelStructure, maps: Sequence[LinearMap]) -> None:
        self._structure, self._maps, self.first = structure, tuple(maps), maps[0].layer

    def begin(self, bare: Sequence[Bare], facts: int) -> None:
        self._bare = tuple(bare)
        shape = facts, len(self._maps), self._structure.hidden_size
        nothing = torch.zeros(shape, dtype=torch.float32, device=self._structure.device)
        self._unit = nothing[:, :, 0]
        self.start, blocks = self._run(nothing)
        self.norm = blocks.norm(dim=2)
        self._unit = self.start.norm(dim=2) / self.norm.clamp_min(1e-30)

    def log_probs(self, group: Group, delta: Tensor) -> Tensor:
        """`Group.log_probs` with ``delta`` ``[facts, maps, n]`` added."""
        with ExitStack() as hooks:
            self._hook(hooks, group, delta)
            return group.log_probs(self._structure, group.replay.hidden)

    def said(self, delta: Tensor) -> Tensor:
        """The maps' outputs at the bare prompts with ``delta`` added to all: each map sees the changes below it."""
        return self._run(delta)[0]

    def _hook(self, hooks: ExitStack, group: Group, delta: Tensor) -> list[list[Tensor]]:
        hidden, at = group.replay.hidden, group.replay.column
        shifts = (delta * self._unit[:, :, None])[group.row_fact].to(hidden.dtype).unbind(1)
        shape = hidden.shape[:2]
        pairs = zip(self._maps, shifts, strict=True)
        return [hooks.enter_context(added(m.module, shape, at, shift)) for m, shift in pairs]

    @torch.no_grad()
    def _run(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the maps, and of their blocks, at the bare prompts with ``delta``."""
        maps, blocks = torch.zeros_like(delta), torch.zeros_like(delta)
        for part in self._bare:
            replay = part.group.replay
            with ExitStack() as hooks:
                said = self._hook(hooks, part.group, delta)
                hidden, at = replay.hidden, 0
                for i, m in enumerate(self._maps):
                    while at <= m.layer - self.first:
                        hidden, at = replay.block(at, hidden), at + 1
                    maps[part.facts, i] = said[i][0][part.rows].float()
                    blocks[part.facts, i] = hidden[part.rows, replay.column].float()
        return maps, blocks
