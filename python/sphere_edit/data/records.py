"""Records of batches: enough to repeat a batch bit for bit, without optimising."""

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
    """Effect of a batch on one weight; all tensors are fp32 on the CPU.

    Attributes:
        keys: ``[b, d]``, the keys of the solve.
        update: ``[n, d]`` or its factors, the projected update that was added to the weight.
        sha256: hash of the weight afterwards; of its fp32 master if the model has 16 bits.
        gradients: ``[b, n]``; the statistics of gradient targets have taken them with ``keys``. None for other targets.
    """

    keys: Tensor
    update: Update
    sha256: str
    gradients: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether the record has neither keys nor an update."""
        return len(self.keys) == 0 and isinstance(self.update, LowRankUpdate) and self.update.left.shape[1] == 0


@dataclass(frozen=True, eq=False)
class BatchRecord:
    """Record of a batch.

    Attributes:
        number: number of the batch, from 1.
        requests: ids of the facts, in order.
        layers: record of each edited weight, by layer.
        events: events of the batch, in order.
        random_state: uint8, torch's random state on the CPU afterwards.
    """

    number: int
    requests: Sequence[str]
    layers: dict[int, LayerRecord]
    events: list[Event]
    random_state: Tensor

    @property
    def skipped(self) -> bool:
        """Whether the guard left the batch out: such a record has a number and facts, but changes nothing."""
        return all(done.empty for done in self.layers.values())


@dataclass
class EditResult:
    """Result of a call of `SphereEditor.edit`.

    Attributes:
        requests: the facts edited, in order.
        records: records of the batches, unless ``on_batch`` took them.
        events: events of the call, as written to ``metrics.jsonl``.
    """

    requests: list[EditRequest]
    records: list[BatchRecord] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def updates(self) -> dict[int, list[Update]]:
        """The updates of each edited layer in the order of adding, one per batch."""
        found: dict[int, list[Update]] = {}
        for record in self.records:
            for layer, done in record.layers.items():
                found.setdefault(layer, []).append(done.update)
        return found


class ReplayError(ValueError):
    """A recorded batch that does not give the recorded weights when repeated; the message names the layer."""
