"""The share of a batch's wanted changes that the written model makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sphere_edit.data.records import LayerRecord
from sphere_edit.events import Event
from sphere_edit.updates import applied

ENOUGH = 0.75  # in healthy runs SPHERE and the null space leave more, a norm after the MLP leaves less
_NAMED = 5


def share_reached(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Mean over facts of ``⟨got, wanted⟩ / ⟨wanted, wanted⟩``, both summed over the pairs; 1 is the whole change.

    Args:
        pairs: (got, wanted), ``[facts, n]`` each, one pair per place. Facts that want no change anywhere do not count.

    Returns:
        None where no fact wants a change.
    """
    inner = [((got.double() * wanted.double()).sum(1), wanted.double().square().sum(1)) for got, wanted in pairs]
    got, wanted = (torch.stack(parts).sum(0) for parts in zip(*inner, strict=True))
    some = wanted > 0
    return float((got[some] / wanted[some]).mean()) if some.any() else None


def share_written(
    done: Mapping[int, LayerRecord], keys: Mapping[int, Tensor], wanted: Mapping[int, Tensor]
) -> float | None:
    """`share_reached` for wanted changes of the edited maps.

    Compares the change ``ΔW k`` of the batch's updates ``ΔW``, for each fact's key in the written model, with the
    change that was solved for.

    Args:
        done: each layer's record, on the CPU.
        keys: ``{layer: [facts, d]}``, from a pass of the written model.
        wanted: ``{layer: [facts, n]}``.
    """
    return share_reached(
        [(applied(record.update, keys[layer].cpu()), wanted[layer].cpu()) for layer, record in done.items()]
    )


def missed(event: Event) -> str | None:
    """Message about a batch whose wanted changes the written model does not make; None where the model makes them.

    A closed loop asks for more until the facts are known, so for its batches the message names the facts not learned.
    Events of such batches have ``rounds``.
    """
    batch = f"batch {event.get('batch')}"
    if event.get("rounds") is not None:
        if not (unlearned := event.get("unlearned")):
            return None
        left = "the model does not give every token of the target first place after the last round"
        return f"{batch}: {event.get('learned')} of {event.get('size')} facts learned; for {named(unlearned)} {left}"
    reached = event.get("reached")
    if reached is None or reached >= ENOUGH:
        return None
    return (
        f"{batch}: reached {reached:.2f} of the wanted change, expected at least {ENOUGH}: in the written model the "
        "last edited layer moves by that share, in the mean over facts, of what their optimised values ask; the solve, "
        "SPHERE's projection or other facts of the batch took the rest, or something after the MLP does"
    )


def named(ids: Sequence[str]) -> str:
    """The first ids, and the number of the others."""
    shown = ", ".join(ids[:_NAMED])
    return shown if len(ids) <= _NAMED else f"{shown} and {len(ids) - _NAMED} more"
