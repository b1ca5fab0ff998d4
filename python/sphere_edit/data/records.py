"""What a batch of edits did: enough to do it again without optimising, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sphere_edit.data.requests import EditRequest
from sphere_edit.events import Event
from sphere_edit.updates import Update
from sphere_kernels import LowRankUpdate


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What a batch did to one weight.

    Attributes:
        keys: ``[b, d]``, what was solved with.
        update: ``[n, d]`` or its factors, projected: what the weight took.
        sha256: of the weight afterwards; of its fp32 master where the model has 16 bits. All tensors fp32 on the CPU.
        gradients: ``[b, n]``, with ``keys`` what the statistics of gradient targets have taken; None for others.
    """

    keys: Tensor
    update: Update
    sha256: str
    gradients: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether the weight took nothing: neither keys nor an update."""
        return len(self.keys) == 0 and isinstance(self.update, LowRankUpdate) and self.update.left.shape[1] == 0


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """A batch.

    Attributes:
        number: from 1.
        requests: ids of the facts, in order.
        layers: what each edited weight took.
        events: what was said about it, in order.
        random_state: uint8, torch's random state on the CPU afterwards.
    """

    number: int
    requests: Sequence[str]
    layers: dict[int, LayerRecord]
    events: list[Event]
    random_state: Tensor

    @property
    def skipped(self) -> bool:
        """Whether the guard has left the batch out: it has its number and its facts, and changes nothing."""
        return all(done.empty for done in self.layers.values())


@dataclass
class EditResult:
    """What a call of `SphereEditor.edit` did.

    Attributes:
        requests: the facts edited, in order.
        records: the batches, unless ``on_batch`` has taken them.
        events: what happened, as written to ``metrics.jsonl``.
    """

    requests: list[EditRequest]
    records: list[BatchRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def updates(self) -> dict[int, list[Update]]:
        """Per edited layer the updates in the order they were added, one a batch."""
        found: dict[int, list[Update]] = {}
        for record in self.records:
            for layer, done in record.layers.items():
                found.setdefault(layer, []).append(done.update)
        return found


class ReplayError(ValueError):
    """A recorded batch that does not give the recorded weights here; the message names the layer."""
