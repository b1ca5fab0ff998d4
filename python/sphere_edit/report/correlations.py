"""Rank correlations between a run's energies and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sphere_edit.evaluation.metrics import SCORES

_FEWEST = 4  # least number of points for a correlation


def correlations(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of energy with scores, over the evaluations along a run.

    Args:
        events: the run's events. The ``curve`` events are the points, if the ``energy`` events have their batch.

    Returns:
        A row for each energy and score: ``energy`` (``sum``: HE summed over the edited layers; ``change``: ``|ΔHE|``
        since before the first edit, summed over them), ``score`` (a name as in evaluations), ``n`` (points with both),
        ``rho``, ``p`` (two-sided, scipy's: by the t distribution, as if the points were independent), and ``why`` both
        are missing, else None. No rows without ``curve`` events.
    """
    from scipy.stats import spearmanr  # the import takes a second

    curve = [event for event in events if event.get("event") == "curve"]
    rows = []
    for energy, by_batch in energies_by_batch(events).items():
        for score in SCORES:
            pairs = [
                (by_batch[event["batch"]], mean)
                for event in curve
                if event["batch"] in by_batch and (mean := (event["scores"].get(score) or {}).get("mean")) is not None
            ]
            x, y = zip(*pairs, strict=True) if pairs else ((), ())
            row: dict[str, Any] = {"energy": energy, "score": score, "n": len(pairs), "rho": None, "p": None}
            if len(pairs) < _FEWEST:
                row["why"] = f"fewer than {_FEWEST} points"
            elif len(set(x)) == 1 or len(set(y)) == 1:
                row["why"] = f"the {'energy' if len(set(x)) == 1 else 'score'} does not vary"
            else:
                found = spearmanr(x, y)
                row |= {"rho": float(found.statistic), "p": float(found.pvalue), "why": None}
            rows.append(row)
    return rows if curve else []


def energies_by_batch(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """By batch: ``sum``, the energy summed over the layers; ``change``, the distance from the first energies."""
    found: dict[int, dict[int, float]] = {}
    for event in events:
        if event.get("event") == "energy":
            found.setdefault(event["batch"], {})[event["layer"]] = event["energy"]
    first = found.get(0, {})
    whole = {batch: of for batch, of in found.items() if of.keys() == first.keys()}
    changes = {batch: math.fsum(abs(of[layer] - first[layer]) for layer in of) for batch, of in whole.items()}
    return {"sum": {batch: math.fsum(of.values()) for batch, of in whole.items()}, "change": changes}
