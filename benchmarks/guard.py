"""Does the guard see broken batches, and no others: ``python -m benchmarks.guard`` → ``results/guard.json``.

SmolLM2-135M edits CounterFact facts with closed-loop and with optimised targets, and the guard judges each batch by the
earlier ones. After three batches (fixed bounds) and after six (medians), one batch is sabotaged in each of several ways
and undone if the guard sees it. More healthy batches follow: of five facts, of one fact, and by MEMIT. Figures of the
stored studies, which keep no batches, are summed up beside them. About ten minutes on one core.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.collect import store
from sphere_edit.data import load_requests
from sphere_edit.data.requests import EditRequest
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.editing.guard import Guard, GuardError
from sphere_edit.events import Event
from sphere_edit.model.loading import load_model
from sphere_edit.runs.run_folder import environment
from sphere_edit.targets.presets import preset
from sphere_kernels import LowRankUpdate, env

MODEL, DATA, SIZE = "smollm2-135m", "counterfact_all.jsonl.gz", 20
STUDIES = Path(__file__).parent / "study" / "results"
Row = dict[str, Any]
Solve = Callable[..., LowRankUpdate]


def _nan(solve: Solve) -> Solve:
    def broken(layer: int, keys: torch.Tensor, residuals: torch.Tensor) -> LowRankUpdate:
        residuals = residuals.clone()
        residuals[0, 0] = torch.nan
        return solve(layer, keys, residuals)

    return broken


def _keys(solve: Solve) -> Solve:
    return lambda layer, keys, residuals: solve(layer, 100 * keys, residuals)


def _step(times: float) -> Callable[[Solve], Solve]:
    def sabotage(solve: Solve) -> Solve:
        def broken(*given: Any) -> LowRankUpdate:
            update = solve(*given)
            return LowRankUpdate(times * update.left, update.right)

        return broken

    return sabotage


SABOTAGE: dict[str, Callable[[Solve], Solve]] = {
    "NaN in a wanted change": _nan,
    "keys times 100": _keys,
    "step times 100": _step(100.0),
    "step times 10": _step(10.0),
    "contradictory facts": lambda solve: solve,
}


def contradictory(facts: Sequence[EditRequest]) -> list[EditRequest]:
    """Half of the facts, and each again with another target; the wordings differ after the subject only."""
    half, others = list(facts[: len(facts) // 2]), facts[len(facts) // 2 :]
    again = [
        replace(fact, prompt=fact.prompt.replace("{}", "{}, of course,"), target_new=other.target_new, id=f"{fact.id}b")
        for fact, other in zip(half, others, strict=True)
    ]
    return half + again


class Run:
    """An editor that collects the guard's false alarms on healthy batches."""

    def __init__(self, model: Any, tokenizer: Any, name: str, method: str | None, targets: str, size: int) -> None:
        self.name = name
        self.alarms: list[str] = []
        config = preset(MODEL, method, targets).replace(batch_size=size, measure_every=0, contexts=0)
        self.editor = SphereEditor(model, tokenizer, config, on_note=print)

    def healthy(self, facts: Sequence[EditRequest]) -> None:
        self.alarms += [event["why"] for event in self.editor.edit(facts).events if event["event"] == "guard"]

    def summary(self) -> Row:
        """The guard's extreme figures over the batches that were not undone."""
        seen = {name: values.tolist() for name, values in self.editor._guard.state_dict().items()}
        row = {"kind": "healthy", "run": self.name, "batches": self.editor.batches, "false_alarms": self.alarms}
        row |= {of: max(max(v) for name, v in seen.items() if name.startswith(of)) for of in ("energy", "step")}
        return row | {"learned": min(seen["learned"], default=None)}

    def sabotaged(self, facts: Sequence[EditRequest]) -> list[Row]:
        """Try each kind of sabotage on the next batch, and restore the weights."""
        editor, rows = self.editor, []
        engine, warns = editor._engine, editor.config
        assert engine is not None
        editor.config = warns.replace(guard="stop")
        before, judge = {layer: weight.clone() for layer, weight in editor.weights().items()}, Guard.judge
        for name, sabotage in SABOTAGE.items():
            row: Row = {"kind": "sabotaged", "run": self.name, "after": editor.batches, "sabotage": name}
            batch = contradictory(facts) if name == "contradictory facts" else list(facts)
            state = {key: value.clone() for key, value in editor.state_dict().items()}

            def noting(guard: Guard, *given: Any, row: Row = row) -> list[Event]:
                for figure, _, value in guard._figures(*given):
                    row[figure] = max(value, row.get(figure, 0.0))
                return judge(guard, *given)

            solve = patch.object(engine.method, "solve", sabotage(engine.method.solve))
            try:
                with solve, patch.object(Guard, "judge", noting):
                    editor.edit(batch)
                row |= {"seen": False, "by": None}
                editor.load_state_dict(state)
            except GuardError as error:
                row |= {"seen": True, "by": sorted({one["figure"] for one in error.found}) or "loop", "why": error.why}
            row["undone"] = all(torch.equal(weight, before[layer]) for layer, weight in editor.weights().items())
            print(row, flush=True)
            rows.append(row)
        editor.config = warns
        return rows


def studies() -> list[Row]:
    """Figures of the stored studies: the energies summed over layers every few batches, and each layer's last step."""
    rows = []
    for path in sorted(STUDIES.glob("*.json")):
        stored = json.loads(path.read_text())
        for name, run in stored.get("runs", {}).items() if isinstance(stored, dict) else ():
            energies = [run["energy"]["before"], *(point["energy"] for point in run["curve"])]
            last = [ends[-1] for ends in run["layers"].values()]
            rows.append(
                {
                    "kind": "study",
                    "run": f"{path.stem}: {name}",
                    "batches_between": run["curve"][0]["edits"] // run["settings"]["batch_size"],
                    "energy": max(abs(b - a) / energies[0] for a, b in zip(energies, energies[1:], strict=False)),
                    "last_step": max(event["update_norm"] / event["weight_norm"] for event in last),
                }
            )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    data = Path(env.EDIT_DATA.value or os.curdir) / DATA
    if not data.is_file():
        sys.exit(f"{env.EDIT_DATA.name} must name a folder with {DATA}; nothing was measured")
    model, tokenizer = load_model(MODEL)
    facts = load_requests(data, limit=500, order="mcf_index")
    rows = studies()
    for targets in ("closed_loop", "optimised"):
        run = Run(model, tokenizer, f"{targets}, {SIZE} facts", None, targets, SIZE)
        for first in (0, 3):
            run.healthy(facts[SIZE * first : SIZE * (first + 3)])
            rows += run.sabotaged(facts[SIZE * (first + 3) : SIZE * (first + 4)])
        rows.append(run.summary())
        print(rows[-1], flush=True)
        run.editor.revert()
    for name, method, size, count in (
        ("MEMIT", "memit", SIZE, 4),
        ("AlphaEdit", None, 5, 8),
        ("AlphaEdit", None, 1, 12),
    ):
        run = Run(model, tokenizer, f"closed_loop, {name}, {size} facts", method, "closed_loop", size)
        run.healthy(facts[200 : 200 + size * count])
        rows.append(run.summary())
        print(rows[-1], flush=True)
        run.editor.revert()
    rows[0]["environment"] = environment()
    store("guard", rows)


if __name__ == "__main__":
    main()
