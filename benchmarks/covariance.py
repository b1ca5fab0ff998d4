"""Number of tokens that the key covariance needs, for SmolLM2-135M: from 1,000 to 100,000 tokens of text.

``python -m benchmarks.covariance`` → ``results/covariance.json``; a few minutes on one core. The benchmark reads
CounterFact and WikiText-2 from ``SPHERE_EDIT_DATA``. Each method solves for the keys of 100 facts with unit residuals;
nothing is written. A row has means over the edited layers:

- ``relative_error`` of the covariance, and the ``null_space_rank``;
- ``reach``: share of its residual that a fact gets, the mean of ``diag(ΔK)``;
- ``disturbed``: squared change of the output for a key of *other* text under the same update, per fact.

FastMEMIT (Gupta et al., Efficient Knowledge Editing via Minimal Precomputation, arXiv 2506.04226) asks this question
for MEMIT with 44 million tokens. Its answer: at least as many keys as features, and ten times as many are enough.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.collect import store
from sphere_edit.config import EditConfig
from sphere_edit.data import load_requests
from sphere_edit.editing.editor import SphereEditor
from sphere_edit.methods import make_method
from sphere_edit.methods.covariance import key_covariances
from sphere_edit.model.inference import frozen
from sphere_edit.model.loading import cache_dir, load_model
from sphere_edit.runs.run_folder import environment
from sphere_edit.targets.keys import LayerPass
from sphere_edit.targets.presets import preset

TOKENS, OTHER_TOKENS, FACTS = (1_000, 3_000, 10_000, 30_000, 100_000), 30_000, 100
METHODS = ("alphaedit", "memit")


def main() -> None:
    torch.set_num_threads(1)
    data = Path(os.environ["SPHERE_EDIT_DATA"])
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    editor = SphereEditor(model, tokenizer, preset("smollm2-135m"))
    facts = load_requests(data / "counterfact_all.jsonl.gz", limit=FACTS, order="mcf_index")
    layers, keys = editor.config.layers, {}
    with frozen(model):
        walk = LayerPass(model, tokenizer, editor.structure, facts, ["{}"], layers)
        for layer in layers:
            walk.advance(layer)
            keys[layer] = walk.keys()

    def covariances(name: str, tokens: int) -> dict[int, Tensor]:
        config = editor.config.replace(covariance_text=str(data / name), covariance_tokens=tokens)
        return key_covariances(model, tokenizer, editor.structure, layers, config, cache_dir() / "covariance")

    other, whole = covariances("wikitext2_test.txt.gz", OTHER_TOKENS), covariances("wikitext2_valid.txt.gz", TOKENS[-1])
    rows = []
    for tokens in TOKENS:
        found = covariances("wikitext2_valid.txt.gz", tokens)
        errors = [float((found[layer] - whole[layer]).norm() / whole[layer].norm()) for layer in layers]
        row: dict[str, Any] = {"tokens": tokens, "features": len(found[layers[0]]), "relative_error": mean(errors)}
        for name in METHODS:
            row[name] = solved(preset("smollm2-135m", name), found, keys, other)
        rows.append(row)
        print(row, flush=True)
    rows[0] |= {"environment": environment(), "facts": FACTS, "other_tokens": OTHER_TOKENS, "layers": list(layers)}
    store("covariance", rows)


def solved(
    config: EditConfig, covariances: dict[int, Tensor], keys: dict[int, Tensor], other: dict[int, Tensor]
) -> dict[str, Any]:
    """Figures of a method's solution for keys ``{layer: [facts, d]}`` with the given covariances."""
    try:
        method = make_method(config, covariances)
    except ValueError as error:
        return {"refused": str(error)}
    reach, disturbed = [], []
    for layer, own in keys.items():
        right = method.solve(layer, own, torch.eye(len(own))).right.double()
        reach.append(float((right * own.double()).sum(1).mean()))
        disturbed.append(float(((right @ other[layer]) * right).sum(1).mean()))
    means = {"reach": mean(reach), "disturbed": mean(disturbed)}
    ranks = getattr(method, "null_space_rank", None)
    return means | ({"null_space_rank": mean(list(ranks.values()))} if ranks else {})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
