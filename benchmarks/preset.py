"""Measurements behind the preset ``smollm2-135m``: the same 40 world-facts edits under other settings of the values.

``python -m benchmarks.preset`` → ``results/preset.json``; about ten minutes on two cores.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.collect import store
from sphere_edit.data import load_requests
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.metrics import evaluate, perplexity
from sphere_edit.model.loading import load_model
from sphere_edit.runs.run_folder import environment
from sphere_edit.targets.presets import preset

EDITS, BATCH = 40, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "values as for llama3-8b: clamp 0.75, lr 0.1, decay 0.5": {
        "value_clamp": 0.75,
        "value_lr": 0.1,
        "value_weight_decay": 0.5,
        "value_stop": 0.05,
        "value_stop_on": "loss",
    },
    "values as for qwen2.5-7b: clamp 4, lr 0.5, decay 1e-3": {"value_stop": 0.05, "value_stop_on": "loss"},
    "the preset: the same, stopped at NLL < 0.1": {},
    "the preset with null-space threshold 5e-3": {"null_space_threshold": 5e-3},
}


def main() -> None:
    torch.set_num_threads(2)
    model, tokenizer = load_model("smollm2-135m")
    requests = load_requests("world-facts", limit=EDITS)

    def measure(name: str, **extra: Any) -> dict[str, Any]:
        scores = evaluate(model, tokenizer, requests).to_dict()
        row = {"name": name, "scores": scores, "perplexity": perplexity(model, tokenizer), **extra}
        print(name, {k: v["mean"] for k, v in scores.items()}, row["perplexity"], flush=True)
        return row

    rows = [measure("before", environment=environment(), edits=EDITS, batch_size=BATCH)]
    for name, changes in SETTINGS.items():
        config = preset("smollm2-135m", targets="optimised").replace(batch_size=BATCH, **changes)
        editor = SphereEditor(model, tokenizer, config)
        editor.prepare()
        start = time.perf_counter()
        editor.edit(requests)
        rows.append(measure(name, settings=config.to_dict(), seconds=time.perf_counter() - start))
        editor.revert()
    store("preset", rows)


if __name__ == "__main__":
    main()
