"""Whole edits by the source of the targets: optimised as published, found in the closed loop, one gradient.

Real model (SmolLM2-135M), the first hundred facts of MultiCounterFact (optimised: the first twenty, for time). One
batch is timed with all of its parts: passes, keys, solve, directions, projection, write, energies, records. The closed
loop runs once in the model's own arithmetic and once in the automatically chosen one. The edits are scored afterwards,
so that quality stands beside speed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sphere_edit.data import load_requests
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.evaluation.metrics import evaluate
from sphere_edit.model.loading import load_model
from sphere_edit.model.tokens import encode
from sphere_edit.targets.presets import preset

FACTS, OPTIMISED = 100, 20
WAYS = {
    "optimised": {"targets": "optimised"},
    "closed_loop_model": {"targets": "closed_loop", "loop_arithmetic": "model"},
    "closed_loop": {"targets": "closed_loop"},
    "gradient": {"targets": "gradient"},
}


@pytest.fixture(scope="module")
def loaded():
    folder = os.environ.get("SPHERE_EDIT_DATA", "")
    data = Path(folder) / "counterfact_all.jsonl.gz"
    if not folder or not data.exists():
        pytest.skip("SPHERE_EDIT_DATA names no folder with counterfact_all.jsonl.gz")
    requests = load_requests(data, limit=FACTS, order="mcf_index")
    return *load_model("smollm2-135m"), requests, str(Path(folder) / "wikitext2_valid.txt.gz")


@pytest.mark.parametrize("way", WAYS)
def test_edits(benchmark, loaded, way, gemm_gflops):
    model, tokenizer, requests, text = loaded
    requests = requests[:OPTIMISED] if way == "optimised" else requests
    changes = dict(WAYS[way])
    config = preset("smollm2-135m", targets=changes.pop("targets")).replace(covariance_text=text, **changes)
    editor = SphereEditor(model, tokenizer, config)
    events = []

    def fresh():
        editor.revert()
        editor.prepare()
        events.clear()
        editor.on_event = events.append

    rounds = 3 if way in ("closed_loop", "gradient") else 1
    rows = [encode(tokenizer, request.prompt, request.subject, request.target_new) for request in requests]
    benchmark.pedantic(editor.edit, args=(requests,), setup=fresh, rounds=rounds)
    batch = next(event for event in events if event["event"] == "batch")
    scores = evaluate(model, tokenizer, requests).to_dict()
    editor.revert()
    benchmark.extra_info.update(
        facts=len(requests),
        passes=round(batch["steps"], 2) if "steps" in batch else 1,
        gflops_per_fact=round(batch["flops"] / len(requests) / 1e9, 1) if "flops" in batch else None,
        tokens={
            "before the subject": sum(row.subject_last for row in rows) / len(rows),
            "from the subject on": sum(len(row.ids) - row.subject_last for row in rows) / len(rows),
            "of the target": sum(len(row.target) for row in rows) / len(rows),
        },
        seconds={stage: round(seconds, 3) for stage, seconds in batch["seconds"].items()},
        scores={name: scores[name]["mean"] for name in scores},
        arithmetic=editor.config.loop_arithmetic if "closed" in way else "model",
        threads=torch.get_num_threads(),
        gemm_gflops=round(gemm_gflops, 1),
        torch=str(torch.__version__),
    )
