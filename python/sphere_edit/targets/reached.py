"""What of a batch's wanted changes is in the written model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_edit.records import Event, LayerRecord

ENOUGH = 0.9  # see CHANGELOG: healthy runs are above
_NAMED = 5


def share_reached(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Mean over facts of ``⟨got, wanted⟩ / ⟨wanted, wanted⟩``, summed over the pairs; 1 is all of it.

    Args:
        pairs: (got, wanted), ``[facts, n]`` each, of one place a pair. Facts that want no change anywhere do not count.

    Returns:
        None where no fact wants a change.
    """
    inner = [((got.double() * wanted.double()).sum(1), wanted.double().square().sum(1)) for got, wanted in pairs]
    got, wanted = (torch.stack(parts).sum(0) for parts in zip(*inner, strict=True))
    some = wanted > 0
    return float((got[some] / wanted[some]).mean()) if some.any() else None


def share_written(done: Mapping[int, LayerRecord], keys: Mapping[int, Tensor], wanted: Mapping[int, Tensor]) -> Any:
    """`share_reached` where changes are wanted of the edited maps: what the batch's updates ``ΔW`` give for each fact's
    key in the written model, ``ΔW k``, beside the change that was solved for.

    Args:
        done: what each layer took, on the CPU.
        keys: ``{layer: [facts, d]}``, from a pass of the written model.
        wanted: ``{layer: [facts, n]}``.
    """
    pairs = []
    for layer, record in done.items():
        got = keys[layer].cpu() @ record.right.T
        pairs.append((got if record.left is None else got @ record.left.T, wanted[layer].cpu()))
    return share_reached(pairs)


def warn_missed(event: Event) -> None:
    """Say what of a batch is not in the written model, if the loop itself did not answer for it."""
    if "flops" in event:  # a closed loop asks for more until the facts are known: what counts is what was learned
        if unlearned := event["unlearned"]:
            warnings.warn(
                f"batch {event['batch']}: {event['learned']} of {event['size']} facts learned; after "
                f"the last round the model does not say the target of {named(unlearned)}",
                stacklevel=2,
            )
    elif (reached := event.get("reached")) is not None and reached < ENOUGH:
        warnings.warn(
            f"batch {event['batch']}: reached {reached:.2f} of the wanted change, expected at least {ENOUGH}: in the "
            "written model the last edited layer moves by that share of what the facts' optimised values ask, on the "
            "mean; the solve, SPHERE's projection, or other facts of the batch take the rest",
            stacklevel=2,
        )


def named(ids: Sequence[str]) -> str:
    """The first ids, and how many more there are."""
    shown = ", ".join(ids[:_NAMED])
    return shown if len(ids) <= _NAMED else f"{shown} and {len(ids) - _NAMED} more"
