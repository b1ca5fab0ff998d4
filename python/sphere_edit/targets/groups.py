"""Groups of facts' rows that run together, and the places that the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.model.partial_forward import Replay
from sphere_edit.model.structure import ModelStructure
from sphere_edit.model.tokens import Row, encode


@dataclass
class Group:
    """Rows whose tokens from the subject's last on are replayed together.

    Attributes:
        row_fact: ``[rows]``, the fact of each row.
        read_row, read_column: the places whose logits the loss reads, flattened.
        want: the token that each place should predict, or -1 where the KL term reads the distribution.
        weight: the share of each place in its fact's loss.
        reference: log-probabilities at the KL places before any change, ``[KL places, vocabulary]``.
    """

    replay: Replay
    row_fact: Tensor
    read_row: Tensor
    read_column: Tensor
    want: Tensor
    weight: Tensor
    reference: Tensor | None = None

    @classmethod
    def of(cls, structure: ModelStructure, replay: Replay, facts: Sequence[int], rows: Sequence[Row], of: int) -> Group:
        """The group of a replay whose ``column`` is each row's subject; rows without a target are KL rows.

        Args:
            of: the number of rows in which each fact has its target.
        """
        places = []
        for i, row in enumerate(rows):
            if row.target:
                first = replay.column + len(row.ids) - len(row.target) - row.subject_last
                places += [(i, first + k, token, 1 / (of * len(row.target))) for k, token in enumerate(row.target)]
            else:
                places.append((i, replay.column, -1, 1.0))
        device = structure.device
        at, column, want = (torch.tensor(x, device=device) for x in list(zip(*places, strict=True))[:3])
        weight = torch.tensor([p[3] for p in places], dtype=torch.float32, device=device)
        group = cls(replay, torch.tensor(list(facts), device=device), at, column, want, weight)
        if (want < 0).any():
            with torch.no_grad():
                group.reference = group.log_probs(structure, replay.hidden)[want < 0]
        return group

    def rows(self, keep: Tensor) -> Group:
        """The group of some rows only, ``[kept]`` indices."""
        place = torch.full((len(self.row_fact),), -1, dtype=torch.long, device=keep.device)
        place[keep] = torch.arange(len(keep), device=keep.device)
        read = place[self.read_row] >= 0
        reference = None if self.reference is None else self.reference[read[self.want < 0]]
        return Group(
            self.replay.rows(keep),
            self.row_fact[keep],
            place[self.read_row[read]],
            self.read_column[read],
            self.want[read],
            self.weight[read],
            reference,
        )

    def wanted(self, active: Tensor, worth: float) -> Group | None:
        """The group without the rows of inactive facts, or None if no row is left; the group itself if more than the
        share ``worth`` of its rows is active, or if its replay cannot be cut."""
        active = active[self.row_fact]
        count = int(active.sum())
        if count == 0:
            return None
        return self.rows(active.nonzero()[:, 0]) if count <= worth * len(active) and self.replay.can_cut else self

    def tells_target(self) -> Tensor:
        """Indices of the rows that have a target; the other rows serve the KL term."""
        return self.read_row[self.want >= 0].unique()

    def log_probs(self, structure: ModelStructure, hidden: Tensor) -> Tensor:
        """Log-probabilities ``[places, vocabulary]``, fp32, after the replay's blocks run on ``hidden``."""
        out = self.replay.run(hidden)[self.read_row, self.read_column]
        return structure.logits(out).float().log_softmax(-1)

    def misses(self, log_probs: Tensor, facts: int) -> Tensor:
        """Number of each fact's target tokens that are not the likeliest, ``[facts]``."""
        targets = self.want >= 0
        wrong = (log_probs[targets].argmax(-1) != self.want[targets]).float()
        return wrong.new_zeros(facts).index_add(0, self.row_fact[self.read_row][targets], wrong)

    def losses(self, log_probs: Tensor, facts: int) -> tuple[Tensor, Tensor]:
        """This group's share of each fact's NLL and KL, ``[facts]`` each."""
        fact = self.row_fact[self.read_row]
        zero = torch.zeros(facts, dtype=torch.float32, device=log_probs.device)
        targets, kl = self.want >= 0, self.want < 0
        picked = log_probs[targets].gather(1, self.want[targets][:, None])[:, 0]
        nll = zero.index_add(0, fact[targets], -picked * self.weight[targets])
        if self.reference is None:
            return nll, zero
        now = log_probs[kl]
        divergence = (now.exp() * (now - self.reference)).sum(1)
        return nll, zero.index_add(0, fact[kl], divergence)


def essence(tokenizer: Any, subject: str) -> Row:
    """ "{subject} is a" up to the subject's last token: the row without a target that the KL term reads."""
    row = encode(tokenizer, "{} is a", subject)
    return Row(row.ids[: row.subject_last + 1], row.subject_last)
