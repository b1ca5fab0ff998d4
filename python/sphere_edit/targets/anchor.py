"""NAS: every value gets the length that values have in the model before all edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sphere_edit.targets.optimised import Values

_DROPPED = 0.05  # share of the longest values that the mean leaves out
_BEYOND = 2.0  # anchors: a longer value is given up


def solved_outputs(values: Values, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What the edited maps are to say, v* ``{layer: [facts, n]}``, at the places that have a value.

    That is the last map, whose block moves by what it moves by, or every map that has a value of its own.

    Args:
        own: ``{layer: [facts, n]}``, what the maps say now, v₀, at the same tokens.
    """
    if values.outputs:
        return values.outputs
    last = max(own)
    return {last: own[last] + values.target - values.start}


def mean_length(values: Tensor) -> float:
    """The anchor: mean ‖v*‖ of ``values [facts, n]`` without the longest twentieth."""
    lengths = values.double().norm(dim=1).sort().values
    return float(lengths[: len(lengths) - int(_DROPPED * len(lengths))].mean())


def anchored(values: Values, own: Mapping[int, Tensor], anchors: Mapping[int, float]) -> tuple[Values, Tensor]:
    """The values with ``v* ← a v* / ‖v*‖``, and ``v* = v₀`` (no change) where ``‖v*‖ > 2 a``.

    A fact whose value is given up stays in the solve, so that it is held where it is.

    Args:
        own: as for `solved_outputs`.
        anchors: ``{layer: a}``, from `mean_length` before the first edit.

    Returns:
        The values, and ``[facts]`` bool: whose were given up, at one of the maps at least.

    Source: Liu et al., Norm Anchors Make Model Edits Last (NAS, arXiv 2602.02543), whose code was read: the MLP's
        output is what is scaled, and the rest of the block's output is left as it is. There the anchor comes from
        1,000 facts of CounterFact, here from world-facts; that code does not have values of several maps (see
        `places.AtMaps`).
    """
    wanted, given_up = {}, torch.zeros(len(values.target), dtype=torch.bool, device=values.target.device)
    for layer, said in solved_outputs(values, own).items():
        length = said.norm(dim=1, keepdim=True)
        beyond = length > _BEYOND * anchors[layer]
        wanted[layer] = torch.where(beyond, own[layer], said * (anchors[layer] / length.clamp_min(1e-30)))
        given_up |= beyond[:, 0]
    last = max(wanted)
    if values.outputs:
        return replace(values, target=wanted[last], outputs=wanted), given_up
    return replace(values, target=values.start + (wanted[last] - own[last])), given_up
