"""Origin of an edited weight's principal directions: the pretrained weight, or the edits?

    python -m benchmarks.study.directions --config benchmarks/study/scale.yaml

For each finished run in ``runs/study/NAME``; writes ``results/NAME-directions.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.data import load
from sphere_edit.experiments.study import Study, expanded, finished, slug
from sphere_edit.model.structure import find_structure
from sphere_edit.runs import run_folder
from sphere_edit.runs.deltas import switch
from sphere_kernels import principal_directions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the study's file")
    given = parser.parse_args()
    study = Study.read(given.config)
    model, _ = load(expanded(study.model), study.dtype, "cpu", study.threads, False)
    structure, rows = find_structure(model), []
    for name in study.runs:
        run = Path("runs/study") / study.name / slug(name)
        if finished(run):
            settings = run_folder.read_config(run)["settings"]
            layers, ratio = settings["layers"], settings["energy_ratio"]
            before = {layer: structure.down[layer].weight.double() for layer in layers}
            switch(run, structure, "after")
            after = {layer: structure.down[layer].weight.double() for layer in layers}
            switch(run, structure, "before")
            rows += [{"run": name, "layer": i, **whose(before[i], after[i], ratio)} for i in layers]
    path = RESULTS / f"{study.name}-directions.json"
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(path)


def whose(before: Tensor, after: Tensor, ratio: float) -> dict[str, Any]:
    """Compare the principal directions of ``after [n, d]``, of ``before`` and of the edits.

    Returns:
        ``rank`` of ``after``, and ``rank_before``; ``of_before`` and ``of_edits``, overlaps of the directions of
        ``after`` with the directions of ``before``, and with as many leading directions of ``after - before`` (the
        share of the smaller subspace that lies in the other); ``grown``, the norm of ``after - before`` over the norm
        of ``before``; ``inside``, the share of ``after - before`` (squared) in the directions of ``before``.
    """
    added = after - before
    old, new = (principal_directions(weight, ratio).basis for weight in (before, after))
    own = torch.linalg.svd(added, full_matrices=False)[2][: new.shape[1]].T
    return {
        "rank": new.shape[1],
        "rank_before": old.shape[1],
        "of_before": _common(new, old),
        "of_edits": _common(new, own),
        "grown": float(added.norm() / before.norm()),
        "inside": float((added @ old).square().sum() / added.square().sum()),
    }


def _common(one: Tensor, two: Tensor) -> float:
    return float((one.T @ two).square().sum() / min(one.shape[1], two.shape[1]))


if __name__ == "__main__":
    main()
