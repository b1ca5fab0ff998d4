"""NAS: scale every value to the mean length of values in the model before all edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sphere_edit.targets.optimised import Values

_DROPPED = 0.05  # the mean leaves out this share of the values, the longest
_BEYOND = 2.0  # in anchors; a longer value is given up


def solved_outputs(values: Values, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The wanted outputs v* ``{layer: [facts, n]}`` of the edited maps that have a value.

    Either the last map alone, whose block adds the map's change unchanged, or every map, each with its own value.

    Args:
        own: ``{layer: [facts, n]}``, the maps' present outputs v₀ at the same tokens.
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

    A fact whose value is given up stays in the solve, which then holds the fact where it is.

    Args:
        own: as for `solved_outputs`.
        anchors: ``{layer: a}``, from `mean_length` before the first edit.

    Returns:
        The values, and ``[facts]`` bool: the facts given up, at one map at least.

    Source: Liu et al., Norm Anchors Make Model Edits Last (NAS, arXiv 2602.02543), whose code was read: it scales the
        MLP's output and leaves the rest of the block's output as it is. Its anchor comes from 1,000 facts of
        CounterFact, here the anchor comes from world-facts. That code has no values of several maps (see
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
