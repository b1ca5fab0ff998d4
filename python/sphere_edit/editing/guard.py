"""The guard: notice a batch that breaks a weight, while the batch can still be undone.

A broken edit shows at once: the hyperspherical energy of a layer jumps, the update is as long as the weight itself, or
the facts are not learned. The guard compares these figures of a batch with those of the run's earlier batches. It uses
median and MAD, which one or two broken batches cannot move. Fixed bounds hold until `FIRST` batches are in the weights.

| figure | of | stands out |
| --- | --- | --- |
| energy | each layer: ``|E_after − E_before|`` over the energy of orthogonal rows | above its bound |
| step | each layer: Frobenius norm of the update over that of the weight before the batch | above its bound |
| learned | the batch: share of facts that the model knows afterwards, if the targets report it | below its bound |

The bound of energy and step is ``median + 8 max(1.48 MAD, median / 2)``, at least five medians and never below
`LEAST`. The bound of the share learned is ``median − 4 max(1.48 MAD, median / 20, e)``; ``e`` is the standard error of
the share for this number of facts, and the median of the first batches is taken as one half. A figure that is not
finite always stands out.

Why these numbers (``benchmarks/results/guard.json``): in healthy batches of 20 facts of SmolLM2-135M a layer's energy
changed by 1e-5 at most, and its step was 0.085 at most. The studies (``benchmarks/study/results``) have steps up to
0.22 (100 facts) and, on a model with 128 neurons a layer, an energy change of 2.2 % in ten batches. Steps that were
made 100 times too long changed the energy by only 2 to 3 %, but reached 7 times the weight's norm and more. Hence five
medians, and fixed bounds well above the healthy figures. In the first batches the guard misses two kinds: steps 10
times too long in the closed loop, whose rounds make up for them, and contradictory facts, since the share learned is
hardly bounded there. So few runs cannot prove that no healthy run is ever stopped. Hence the default ``warn``, which
loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sphere_edit.events import Event
from sphere_kernels.streaming import IllConditioned

FIRST = 5  # batches with fixed bounds; medians afterwards
BOUND = {"energy": 0.05, "step": 1.0}  # the fixed bounds
LEAST = {"energy": 0.002, "step": 0.02}  # figures below these are harmless, even after a run of tiny ones
_SPREADS, _SHARE_SPREADS = 8.0, 4.0
_NORMAL = 1.4826  # standard deviation of a normal distribution, in MADs
# The loop raises these for NaN, infinity, and keys too long to solve for.
BROKEN = (FloatingPointError, torch.linalg.LinAlgError, IllConditioned)

Figure = tuple[str, int | None, float]  # name, layer, value


class GuardError(ValueError):
    """A batch stands out and has been undone.

    Attributes:
        batch: its number.
        facts: ids of its facts.
        found: figures that stand out, from `Guard.judge`; empty if the loop itself met NaN or infinity.
        why: the reason, for people.
    """

    def __init__(self, batch: int, facts: Sequence[str], found: Sequence[Event], why: str = "") -> None:
        self.batch, self.facts, self.found = batch, list(facts), list(found)
        self.why = why or describe(found)
        named = ", ".join(self.facts[:20]) + (f", … ({len(self.facts)} in all)" if len(self.facts) > 20 else "")
        super().__init__(
            f"batch {batch} stands out and has been undone: {self.why}; its facts: {named}; "
            "guard 'skip' leaves them out, 'warn' keeps them"
        )


class Guard:
    """Keeps the figures of the batches in the weights, and compares the next batch with these figures.

    Args:
        orthogonal: for each edited layer, the energy of as many orthogonal rows.
    """

    def __init__(self, orthogonal: Mapping[int, float]) -> None:
        self._orthogonal = {layer: abs(energy) or 1.0 for layer, energy in orthogonal.items()}
        self._seen: dict[str, list[float]] = {_key(name, layer): [] for layer in orthogonal for name in BOUND}
        self._seen[_key("learned", None)] = []

    def judge(self, events: Sequence[Event], before: Mapping[int, Event]) -> list[Event]:
        """Find the figures of a batch that stand out.

        Args:
            events: the batch's events, as in its record.
            before: ``energy`` and ``weight_norm`` of each layer before the batch.

        Returns:
            For each: ``figure``, ``layer`` (None for a figure of the batch), ``value`` (None if not finite) and
            ``usual``, the bound that the value exceeds or falls short of.
        """
        size = next((event["size"] for event in events if event["event"] == "batch"), 1)
        found = []
        for name, layer, value in self._figures(events, before):
            usual = self._usual(name, layer, size)
            within = value >= usual if name == "learned" else value <= usual
            if not math.isfinite(value) or not within:
                said = value if math.isfinite(value) else None
                found.append({"figure": name, "layer": layer, "value": said, "usual": usual})
        return found

    def accept(self, events: Sequence[Event], before: Mapping[int, Event]) -> None:
        """Take a batch's figures into the comparison, once the batch is in the weights; arguments as for `judge`."""
        for name, layer, value in self._figures(events, before):
            if math.isfinite(value):
                self._seen[_key(name, layer)].append(value)

    def state_dict(self) -> dict[str, Tensor]:
        """All figures so far, fp64 ``[batches]`` each."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`; one of an earlier version has no figures, and the guard starts anew."""
        self._seen = {name: state[name].tolist() if name in state else [] for name in self._seen}

    def _figures(self, events: Sequence[Event], before: Mapping[int, Event]) -> list[Figure]:
        figures: list[Figure] = []
        for event in events:
            if event["event"] == "energy" and "update_norm" in event:
                layer = event["layer"]
                change = abs(event["energy"] - before[layer]["energy"])
                figures.append(("energy", layer, change / self._orthogonal[layer]))
                figures.append(("step", layer, event["update_norm"] / (before[layer]["weight_norm"] or 1.0)))
            elif event["event"] == "batch" and "learned" in event:
                figures.append(("learned", None, event["learned"] / event["size"]))
        return figures

    def _usual(self, name: str, layer: int | None, size: int) -> float:
        seen = self._seen[_key(name, layer)]
        enough = len(seen) >= FIRST
        if not enough and name != "learned":
            return BOUND[name]
        middle = median(seen) if enough else 0.5
        spread = _NORMAL * median(abs(value - middle) for value in seen) if enough else 0.0
        if name != "learned":
            return max(LEAST[name], middle + _SPREADS * max(spread, middle / 2))
        chance = (middle * size + 0.5) / (size + 1)  # never 0 or 1: few facts cannot show either
        error = math.sqrt(chance * (1 - chance) / size)
        return middle - _SHARE_SPREADS * max(spread, middle / 20, error)


def describe(found: Sequence[Mapping[str, Any]]) -> str:
    """Say in words which figures stand out; for each figure, name the layer furthest beyond the bound."""
    worst: dict[str, Mapping[str, Any]] = {}
    layers: dict[str, list[int]] = {}
    for one in found:
        name = one["figure"]
        layers.setdefault(name, []).append(one["layer"])
        if name not in worst or _beyond(one) > _beyond(worst[name]):
            worst[name] = one
    return "; ".join(_say(one, len(layers[name]) - 1) for name, one in worst.items())


def _beyond(one: Mapping[str, Any]) -> float:
    return math.inf if one["value"] is None else one["value"] / one["usual"]


def _say(one: Mapping[str, Any], others: int) -> str:
    value = "not finite" if one["value"] is None else f"{100 * one['value']:.3g} %"
    more = f", and {others} more layer{'s' if others > 1 else ''}" if others else ""
    usual = f"{100 * one['usual']:.3g} %"
    if one["figure"] == "learned":
        return f"facts learned: {value} (usual: at least {usual})"
    what = {
        "energy": "change of the energy, of that of orthogonal rows",
        "step": "update's norm, of the weight's",
    }[one["figure"]]
    return f"layer {one['layer']}: {what}: {value} (usual: at most {usual}){more}"


def told(event: Event) -> str:
    """A guard's event in one sentence."""
    way = {"skipped": "was left out", "kept": "was kept"}[event["action"]]
    return f"batch {event['batch']} stands out and {way}: {event['why']}; its facts: {', '.join(event['facts'])}"


def _key(name: str, layer: int | None) -> str:
    return name if layer is None else f"{name}.{layer}"
