"""Notice a batch that breaks a weight, while it can still be undone.

A broken edit shows at once: the hyperspherical energy of a layer jumps, its update is as long as the weight itself, or
the facts are not learned. The guard compares these figures of a batch with those of the run's earlier batches, by
median and MAD, which a broken batch or two cannot move. While there are fewer than `FIRST` of them, fixed bounds hold.

| figure | of | stands out |
| --- | --- | --- |
| energy | each layer: ``|E_after − E_before|`` over the energy of orthogonal rows | above the usual |
| step | each layer: Frobenius norm of the update over that of the weight before the batch | above the usual |
| learned | the batch: share of its facts that the model has then, where the targets tell | below the usual |

The usual reaches to ``median + 8 max(1.48 MAD, median / 2)``, five medians at least, and is never less than `LEAST`; of
the share learned to ``median − 4 max(1.48 MAD, median / 20, its error for so many facts)``, where a run's first batches
are taken to learn half. What is not finite stands out always.

Why these numbers (``benchmarks/results/guard.json``): in healthy batches of 20 facts of SmolLM2-135M a layer's energy
changed by 1e-5 at most and its step was 0.085 at most; the studies (``benchmarks/study/results``) have steps up to
0.22 (100 facts) and, on a model with 128 neurons a layer, 2.2 % of energy in ten batches. Steps made 100 times too long
changed the energy by 2 to 3 % only, but were 7 times the weight's norm and more. Hence five medians, and fixed bounds
well above the healthy. Missed in the first batches: steps 10 times too long in the closed loop, which makes up for
them, and contradictory facts, since the share learned is hardly bounded there. So few runs cannot prove that no healthy
run is ever stopped: the default is ``warn``, which loses nothing.
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

FIRST = 5  # batches until medians are taken
BOUND = {"energy": 0.05, "step": 1.0}  # in the batches before
LEAST = {"energy": 0.002, "step": 0.02}  # what is below harms nothing, however still the run was
_SPREADS, _SHARE_SPREADS = 8.0, 4.0
_NORMAL = 1.4826  # standard deviations in a MAD
# What the loop raises where it meets NaN, infinity, or keys too long to be solved for.
BROKEN = (FloatingPointError, torch.linalg.LinAlgError, IllConditioned)

Figure = tuple[str, int | None, float]  # name, layer, value


class GuardError(ValueError):
    """A batch stands out and has been undone.

    Attributes:
        batch: its number.
        facts: the ids of its facts.
        found: what stands out, as `Guard.judge` gives it; empty where the loop itself has met NaN or infinity.
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
    """What the batches in the weights looked like, and whether the next one looks like them.

    Args:
        orthogonal: per edited layer the energy of as many orthogonal rows.
    """

    def __init__(self, orthogonal: Mapping[int, float]) -> None:
        self._orthogonal = {layer: abs(energy) or 1.0 for layer, energy in orthogonal.items()}
        self._seen: dict[str, list[float]] = {_key(name, layer): [] for layer in orthogonal for name in BOUND}
        self._seen[_key("learned", None)] = []

    def judge(self, events: Sequence[Event], before: Mapping[int, Event]) -> list[Event]:
        """What stands out in a batch.

        Args:
            events: what is said of the batch, as in its record.
            before: per layer its ``energy`` and ``weight_norm`` before the batch.

        Returns:
            ``figure``, ``layer`` (None where it is the batch's), ``value`` (None where it is not finite) and ``usual``,
            the bound that it is beyond.
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
        """The batch is in the weights: what comes is compared with it too. Arguments as for `judge`."""
        for name, layer, value in self._figures(events, before):
            if math.isfinite(value):
                self._seen[_key(name, layer)].append(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The figures so far, fp64 ``[batches]`` each."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`; from one of an earlier version, which has no figures, as a run that begins."""
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
        chance = (middle * size + 0.5) / (size + 1)  # never 0 or 1, of which a few facts tell little
        error = math.sqrt(chance * (1 - chance) / size)
        return middle - _SHARE_SPREADS * max(spread, middle / 20, error)


def describe(found: Sequence[Mapping[str, Any]]) -> str:
    """What stands out, as one says it; of each figure the layer that is furthest beyond its bound."""
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
