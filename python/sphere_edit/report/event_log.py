"""The events of a run, sorted for pages, plots and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sphere_edit.events import Event
from sphere_edit.targets.reached import missed

_STAGES = {
    "values": "optimise values",
    "passes": "forward and backward passes",
    "check": "ask the model itself",
    "keys": "collect keys",
    "project": "directions, project",
    "update": "write, energy",
    "measure": "movement, spectrum, bound",
    "record": "record, hash",
    "keep": "write batch files",
    "skipped": "batches that the guard left out",
}


@dataclass(frozen=True)
class Log:
    """The events of a run: energies by layer, from before the first edit on; all else by ``before`` and ``after``."""

    events: Sequence[Event]
    energies: dict[int, list[Event]]
    scores: dict[str, dict[str, Any]]
    perplexity: dict[str, Any]
    spectra: dict[str, dict[int, Event]]
    cosines: dict[str, dict[int, Event]]

    @classmethod
    def of(cls, events: Sequence[Event]) -> Log:
        log = cls(events, {}, {}, {}, {"before": {}, "after": {}}, {"before": {}, "after": {}})
        for event in sorted(log.of_kind("energy"), key=lambda e: (int(e["layer"]), e["batch"])):
            log.energies.setdefault(int(event["layer"]), []).append(event)
        for event in log.of_kind("evaluation"):
            log.scores[event["when"]], log.perplexity[event["when"]] = event["scores"], event.get("perplexity")
        for event in log.of_kind("spectrum"):
            log.spectra[event["when"]][int(event["layer"])] = event
        for event in log.of_kind("cosines"):
            log.cosines[event["when"]][int(event["layer"])] = event
        return log

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if isinstance(event, dict) and event.get("event") == kind]

    def last(self, kind: str) -> Event:
        return (self.of_kind(kind) or [{}])[-1]

    def score(self, name: str, when: str) -> dict[str, Any]:
        return self.scores.get(when, {}).get(name) or {"mean": None, "stderr": None, "n": None}

    def ability(self) -> dict[str, dict[str, Any]]:
        """Scores of general ability by task and metric, then by ``before`` and ``after``."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.of_kind("evaluation"):
            for name, score in event.get("ability", {}).items():
                found.setdefault(name, {})[event["when"]] = score
        return found

    def learned(self) -> dict[str, Any] | None:
        """Facts learned right after each batch, facts in all, facts not learned, and the share of the wanted changes
        that was reached; None if the batch events have no ``learned``."""
        seen = [event for event in self.of_kind("batch") if event.get("learned") is not None]
        if not seen:
            return None
        return {
            "learned": sum(event["learned"] for event in seen),
            "of": sum(event["size"] for event in seen),
            "unlearned": [fact for event in seen for fact in event.get("unlearned", ())],
            "reached": mean_of(event.get("reached") for event in seen),
            "least": min((event["reached"] for event in seen if event.get("reached") is not None), default=None),
            "looped": any(event.get("rounds") is not None for event in seen),
            "missed": [said for event in seen if event.get("rounds") is None and (said := missed(event))],
        }

    def excess(self, when: str) -> float:
        """Excess energy ``before`` or ``after``, summed over the edited layers."""
        return math.fsum(seen[-1 if when == "after" else 0]["excess"] for seen in self.energies.values())

    def layer(self, layer: int) -> dict[str, Any]:
        """First and last energy events of a layer, numbers of directions, and mean figures of the updates."""
        seen, before, after = self.energies[layer], *(self.spectra[w].get(layer, {}) for w in ("before", "after"))
        directions = len((before or after).get("eigenvalues", [])) or None
        ends = {"first": seen[0], "last": seen[-1], "r_before": before.get("rank"), "r_after": after.get("rank")}
        means = {name: mean_of(e.get(name) for e in seen[1:]) for name in ("suppressed", "update_norm", "residual")}
        return {**ends, **means, "directions": directions}

    def measured(self, layer: int) -> list[Event]:
        """The energy events of a layer with figures of `sphere_edit.evaluation.weights`, first to last."""
        return [event for event in self.energies[layer] if event.get("moved_mean") is not None]

    def bounds(self) -> list[dict[str, Any]]:
        """For each layer with bounds: means over the batches, and ``closest``, the least ratio of step to bound."""
        rows = []
        for layer in self.energies:
            if seen := [event for event in self.measured(layer) if event.get("bound") is not None]:
                names = ("lipschitz", "bound", "step_squared", "output_change")
                row = {name: mean_of(event.get(name) for event in seen) for name in names}
                ratios = [e["step_squared"] / e["bound"] for e in seen if e["bound"] and e["step_squared"] is not None]
                row["energy_step"] = mean_of(abs(event["energy_step"]) for event in seen)
                rows.append({"layer": layer, "closest": min(ratios, default=None), "n": seen[0]["neurons"], **row})
        return rows

    def most_moved(self) -> int | None:
        """The layer whose energy the run changed most."""
        moved = {layer: abs(energy_change(seen[-1], seen[0])) for layer, seen in self.energies.items()}
        return max(moved, key=moved.__getitem__, default=None)

    def guarded(self) -> dict[str, Any] | None:
        """Batches that stood out, number of facts left out, and changes of the guard; None without either."""
        found, changes = self.of_kind("guard"), self.of_kind("setting")
        left = sum(len(event["facts"]) for event in found if event["action"] == "skipped")
        return {"batches": found, "left": left, "changes": changes} if found or changes else None

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, summed over all batches."""
        sums: dict[str, float] = {}
        for event in self.of_kind("batch"):
            for stage, seconds in event.get("seconds", {}).items():
                sums[stage] = sums.get(stage, 0.0) + seconds
        return sums

    def stages(self) -> list[tuple[str, float]]:
        """(stage, seconds) of the preparation, of all batches by stage, and of the rest of the run."""
        sums: dict[str, float] = {}
        for event in self.of_kind("prepared"):
            sums["prepare (contexts, key covariance)"] = event.get("seconds", 0.0)
        sums |= {_STAGES.get(stage, stage): seconds for stage, seconds in self.seconds().items()}
        if total := self.last("finished").get("seconds"):
            sums["evaluate, sample, write files"] = max(0.0, total - sum(sums.values()))
        return list(sums.items())


def energy_change(event: Event, first: Event) -> float:
    """Change of a layer's energy since the event ``first``."""
    return event["energy"] - first["energy"]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
