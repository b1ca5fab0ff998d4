"""Events of a run: one JSON object per line of ``metrics.jsonl``; the field ``event`` names its kind.

`KINDS` is the whole vocabulary. Report, plots and studies read nothing else. A file begins with its ``schema``; files
of version 0.1 have no ``schema``, but the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
SCHEMA = 2


@dataclass(frozen=True)
class Field:
    """Field of an event: types of its JSON value, whether every event of the kind has the field, and its meaning."""

    types: tuple[type, ...]
    always: bool
    doc: str


def _has(doc: str, *types: type) -> Field:
    return Field(types, True, doc)


def _may(doc: str, *types: type) -> Field:
    return Field(types, False, doc)


_NONE = type(None)
_PLACE = {
    "batch": _has("number of batches in the weights; 0 before the first", int),
    "edits": _has("number of facts they held", int),
}
_WHEN = {"when": _has("before or after the run; now for a model by itself", str)}
_LAYER = {"layer": _has("number of the decoder block", int)}

KINDS: dict[str, dict[str, Field]] = {
    "schema": {"version": _has("of this vocabulary", int)},
    "prepared": {
        "contexts": _has("templates of prefixes; the first is the bare prompt", list),
        "null_space_rank": _has("dimensions of the null space by layer; empty for methods without", dict),
        "anchors": _may("lengths of values by layer, where they are anchored", dict),
        "seconds": _has("that it took", float),
    },
    "energy": _PLACE
    | _LAYER
    | {
        "energy": _has("hyperspherical energy of the weight", float),
        "excess": _has("over that of as many orthogonal neurons", float),
        "update_norm": _may("Frobenius norm of the batch's update", float),
        "weight_norm": _may("Frobenius norm of the weight with it", float),
        "suppressed": _may("share of the update's squared norm that SPHERE's projection took", float),
        "protected": _may("share of the squared norm left that REVIVE's filter took", float),
        "residual": _may("mean length of the wanted changes", float),
        "rank": _may("number of principal directions", int),
        "energy_ratio": _may("share of the spectrum that they hold", float),
        "directions": _may("how tracked directions were renewed", str),
        "energy_bound": _may("share that exact directions of that rank hold at most", float),
        "neurons": _may("rows of the weight", int),
        "moved_mean": _may(
            "mean distance of neurons on the sphere from where they were before all edits", float, _NONE
        ),
        "moved_max": _may("largest of these distances", float, _NONE),
        "weight_rank": _may("numerical rank of the weight", int),
        "spectral_norm": _may("its largest singular value", float, _NONE),
        "condition": _may("largest over smallest singular value", float, _NONE),
        "step_squared": _may("‖ΔŴ‖² of the batch", float, _NONE),
        "output_change": _may(
            "expected squared change of outputs on general text, a share of the outputs'", float, _NONE
        ),
        "energy_step": _may("ΔHE of the batch", float, _NONE),
        "lipschitz": _may("K of the theorem, of the weight before", float, _NONE),
        "bound": _may("(ΔHE / K)²", float, _NONE),
    },
    "batch": _PLACE
    | {
        "size": _has("facts of the batch", int),
        "seconds": _has("by stage; keep is that of the batch before", dict),
        "skipped": _may("true where the guard left the batch out; figures below are then absent", bool),
        "loss": _may("mean loss of the optimised values, or of training", float),
        "nll": _may("mean NLL of a target token, in nats: in the written model for closed-loop targets", float),
        "steps": _may("mean number of steps, or rounds, of a fact", float),
        "rounds": _may("rounds of the closed loop", int),
        "flops": _may("floating-point operations of its passes", float),
        "learned": _may("facts whose target the written model gives first place, token by token", int),
        "unlearned": _may("ids of the others", list),
        "fact_nll": _may("NLL of each fact in the written model, in nats", list),
        "reached": _may("share of the wanted change that the written model makes", float, _NONE),
        "positions": _may("target tokens of a gradient batch", int),
        "beyond_anchor": _may("facts given up because their values were beyond twice the anchor", int),
    },
    "guard": _PLACE
    | {
        "action": _has("skipped or kept", str),
        "facts": _has("ids of the batch's facts", list),
        "found": _has("figures that stand out: figure, layer, value, usual", list),
        "why": _has("the same in words", str),
    },
    "setting": {
        "batch": _has("after which it changed", int),
        "name": _has("of the setting", str),
        "value": _has("new value", str),
    },
    "evaluation": _WHEN
    | {
        "scores": _has("by name: mean, stderr, n", dict),
        "perplexity": _has("of held-out text", float, _NONE),
        "ability": _may("scores of general ability by task and metric", dict),
    },
    "curve": _PLACE
    | {
        "scores": _has("of requests edited so far: by name mean, stderr, n", dict),
        "first": _has("of the first requests", dict),
        "last": _has("of the newest", dict),
        "perplexity": _has("of held-out text", float, _NONE),
        "ability": _may("scores of general ability by task and metric", dict),
    },
    "spectrum": _WHEN
    | _LAYER
    | {
        "rank": _has("number of principal directions", int),
        "energy_ratio": _has("share of the spectrum that they hold", float),
        "eigenvalues": _has("of the Gram matrix, from the largest", list),
    },
    "cosines": _WHEN
    | _LAYER
    | {
        "neurons": _has("rows drawn", list),
        "cosines": _has("of each pair of them", list),
        "mean_abs": _has("mean |cosine| of all pairs of rows", float, _NONE),
    },
    "request": {
        "id": _has("of the request", str),
        "before": _has("its scores before the run", dict),
        "after": _has("its scores after it", dict),
    },
    "sample": {
        "kind": _has("of prompt", str),
        "prompt": _has("what was to be completed", str),
        "before": _has("greedy completion before the run", str),
        "after": _has("greedy completion after it", str),
    },
    "finished": {"seconds": _has("of the whole run, over all processes that had a part in it", float)},
}


def check_event(event: Mapping[str, Any]) -> None:
    """Raise ValueError unless an event agrees with `KINDS`."""
    kind = event.get("event")
    if kind not in KINDS:
        raise ValueError(f"event {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    known = KINDS[kind]
    for name in event.keys() - known.keys() - {"event"}:
        raise ValueError(f"event {kind!r} has no field {name!r}; expected of {', '.join(known)}")
    for name, field in known.items():
        if name not in event:
            if field.always:
                raise ValueError(f"event {kind!r} lacks its field {name!r}")
        elif type(event[name]) not in field.types:
            expected = " or ".join("null" if one is _NONE else one.__name__ for one in field.types)
            raise ValueError(f"event {kind!r}: {name} must be {expected}, got {event[name]!r}")
