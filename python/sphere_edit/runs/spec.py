"""What a run does besides editing: its options, and how they are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sphere_edit.evaluation.metrics import PERPLEXITY_TOKENS

# Of `RunOptions`.
LEAST_COUNTS = {"checkpoint_every": 1, "curve_every": 0, "curve_sample": 1, "curve_answers": 0, "score_sample": 1}


@dataclass(frozen=True)
class RunOptions:
    """What a run does besides editing.

    Args:
        model_name, data_name: as the user gave them; for the record.
        out: the run folder.
        perplexity_text, perplexity_tokens: see `metrics.perplexity`.
        checkpoint_every: batches between two copies of the whole state, from which a stopped run goes on.
        save_model: also write the edited model.
        curve_every: batches between two evaluations on the way; 0 for none.
        curve_sample: how many requests each of their groups has at most; see `snapshots.curve`.
        curve_answers: how many requests of each group the model also answers by itself; 0 for none.
        score_sample: how many requests are scored before and after, drawn by the run's seed; None is all.
        answers: also let the model answer their prompts by itself, before and after; see `answers`.
        judge, judge_model: address and model of a judge of these answers, see `judge.Endpoint`.
        harness: tasks of general ability, scored before, after and at the evaluations on the way; see `harness`.
        harness_data, harness_limit: folder of their files, and how many records of each are asked.
        harness_ends: score them before and after only.
        overwrite: replace an earlier run at ``out`` once this one is complete.
        given: how model and data were read, for those who go on with the run.
    """

    model_name: str
    data_name: str
    out: Path
    perplexity_text: str = "heldout"
    perplexity_tokens: int = PERPLEXITY_TOKENS
    checkpoint_every: int = 10
    save_model: bool = False
    overwrite: bool = False
    curve_every: int = 0
    curve_sample: int = 200
    curve_answers: int = 0
    score_sample: int | None = None
    answers: bool = False
    judge: str | None = None
    judge_model: str | None = None
    harness: tuple[str, ...] = ()
    harness_data: str | None = None
    harness_limit: int | None = None
    harness_ends: bool = False
    given: dict[str, Any] = field(default_factory=dict)


def recorded_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The options other than settings that a run was begun with, from its ``config.yaml``."""
    own = {name: recorded[name] for name in ("perplexity_text", "device", "save_model", "checkpoint_every")}
    later = {"curve_every": 0, "curve_sample": None, "curve_answers": 0, "score_sample": None, "answers": False}
    later |= {"judge": None, "judge_model": None, "harness_data": None, "harness_limit": None, "harness_ends": False}
    own |= {name: recorded.get(name, value) for name, value in later.items()}  # which earlier runs do not have
    own["harness"] = ",".join(recorded.get("harness") or ()) or None
    own |= {"overwrite": recorded["replaces"] is not None, "threads": recorded["environment"]["threads"]}
    own |= {"on_conflict": recorded["given"].get("on_conflict", "refuse")}  # as earlier runs and those from Python
    return own | {name: recorded["given"].get(name) for name in ("limit", "order", "preset", "dtype")}
