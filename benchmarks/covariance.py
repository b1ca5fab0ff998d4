"""How few tokens the key covariance needs: 100 edits of SmolLM2-135M, its covariance from 1,000 to 100,000 tokens.

``python -m benchmarks.covariance METHOD TOKENS`` → a row of ``results/covariance.json``; a few minutes each on one
core. It takes CounterFact and WikiText-2 from ``SPHERE_EDIT_DATA``. Beside the scores a row says how far the covariance
is from one of other text, the rank of the null space, and what share of the other text's keys lies in it.

FastMEMIT (Gupta et al., Efficient Knowledge Editing via Minimal Precomputation, arXiv 2506.04226) asks this of MEMIT
with 44 million tokens: at least as many keys as features, and ten times as many are enough.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.collect import RESULTS, machine, store
from sphere_edit import SphereEditor, evaluate, load_model, load_requests, perplexity, preset
from sphere_edit.config import EditConfig
from sphere_edit.covariance import key_covariances
from sphere_edit.methods.alphaedit import null_space
from sphere_edit.models import cache_dir
from sphere_edit.runs import environment

EDITS, OTHER_TOKENS, PERPLEXITY_TOKENS = 100, 30_000, 20_000


def main(method: str, tokens: int, threads: int) -> None:
    torch.set_num_threads(threads)
    data = Path(os.environ["SPHERE_EDIT_DATA"])
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    requests = load_requests(data / "counterfact_all.jsonl.gz", limit=EDITS, order="mcf_index")
    text, other = data / "wikitext2_valid.txt.gz", data / "wikitext2_test.txt.gz"
    config = preset("smollm2-135m", method).replace(covariance_text=str(text), covariance_tokens=tokens)
    editor = SphereEditor(model, tokenizer, config)
    row: dict[str, Any] = {"method": method, "tokens": tokens, "edits": EDITS, "other_tokens": OTHER_TOKENS}
    found = _covariances(editor, config)
    row |= _apart(
        found, _covariances(editor, config.replace(covariance_text=str(other), covariance_tokens=OTHER_TOKENS))
    )
    try:
        editor.edit(requests)
    except ValueError as error:
        row["refused"] = str(error)
    else:
        row["scores"] = evaluate(model, tokenizer, requests).to_dict()
        row["perplexity"] = perplexity(model, tokenizer, str(other), PERPLEXITY_TOKENS)
    settings = config.to_dict() | {"covariance_text": text.name}
    row |= {"settings": settings, "environment": environment(), "commit": machine()["commit"]}
    path = RESULTS / "covariance.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [one for one in rows if (one["method"], one["tokens"]) != (method, tokens)]
    store("covariance", sorted([*kept, row], key=lambda one: (one["method"], one["tokens"])))
    print({name: value for name, value in row.items() if name not in ("settings", "environment")})


def _covariances(editor: SphereEditor, config: EditConfig) -> dict[int, Tensor]:
    args = editor.model, editor.tokenizer, editor.structure, editor.config.layers, config
    return key_covariances(*args, cache_dir() / "covariance")


def _apart(found: dict[int, Tensor], other: dict[int, Tensor]) -> dict[str, float]:
    """Means over the layers."""
    threshold, means = EditConfig().null_space_threshold, []
    for layer, moment in other.items():
        basis = null_space(found[layer], threshold, layer).kept
        assert basis is not None
        inside = ((basis.T @ moment) * basis.T).sum() / moment.trace()
        means.append([float((found[layer] - moment).norm() / moment.norm()), basis.shape[1], float(inside)])
    names = ("relative_error", "null_space_rank", "of_other_text_in_it")
    return {name: sum(values) / len(values) for name, values in zip(names, zip(*means, strict=True), strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=("alphaedit", "memit"))
    parser.add_argument("tokens", type=int)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    main(given.method, given.tokens, given.threads)
