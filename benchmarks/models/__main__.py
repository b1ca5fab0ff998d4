"""Which model types can be edited: ``python -m benchmarks.models`` → ``results/models.json``, ``results/twins.json``,
``docs/models.md``.

``census`` builds every model type tiny and edits the model. ``twins`` edits SmolLM2-135M in other families' forms (an
hour on one core; needs ``SPHERE_EDIT_DATA``). ``page`` writes the page from stored rows. Rows stored under the
installed version of transformers are not computed again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as hf

from benchmarks.collect import RESULTS, store
from benchmarks.models import page


def main(*steps: str) -> None:
    torch.set_num_threads(1)
    for step in steps or ("census", "twins", "page"):
        if step == "census":
            from benchmarks.models import census

            census.build("llama")  # loads shared modules before the processes fork
            _gather("models", census.FAMILIES, census.apart)
        elif step == "twins":
            from benchmarks.models import smollm2

            _gather("twins", smollm2.FAMILIES, smollm2.edit)
        elif step == "page":
            page.write()
        else:
            raise SystemExit(f"expected steps out of census, twins and page, got {step!r}")


def _gather(name: str, families: Iterable[str], look: Callable[[str], dict[str, Any]]) -> None:
    """Compute a row for each family, and store each row at once."""
    path, rows = RESULTS / f"{name}.json", {}
    if path.exists():
        rows = {row["family"]: row for row in json.loads(path.read_text())["rows"]}
    for family in families:
        if rows.get(family, {}).get("transformers") != hf.__version__:
            rows[family] = {**look(family), "transformers": hf.__version__}
            print(json.dumps(rows[family]), flush=True)
            store(name, [rows[known] for known in families if known in rows])


if __name__ == "__main__":
    main(*sys.argv[1:])
