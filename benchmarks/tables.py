"""The README's tables, written from the stored rows: ``python -m benchmarks.tables`` (``--check`` only compares)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"

_METRICS = [
    f"{metric}_{kind}" for metric in ("efficacy", "generalization", "specificity") for kind in ("success", "accuracy")
]


def load(name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return stored


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def score(evaluation: dict[str, Any], name: str) -> str:
    found = evaluation["scores"][name]
    return "–" if found["mean"] is None else f"{found['mean']:.3f} ± {found['stderr']:.3f}"


def scores(name: str, labels: list[str]) -> str:
    """Metrics before, then after each run of ``name``."""
    rows = load(name)["rows"]
    assert len(rows) == len(labels)
    before, afters = rows[0]["evaluations"]["before"], [row["evaluations"]["after"] for row in rows]
    body = [[metric.replace("_", " "), *(score(e, metric) for e in [before, *afters])] for metric in _METRICS]
    body.append(["perplexity", *(f"{e['perplexity']:.2f}" for e in [before, *afters])])
    return table(["", "before", *labels], body)


def energies(name: str, labels: list[str]) -> str:
    """Excess energy per layer before, then after each run of ``name``."""
    rows = load(name)["rows"]
    body = [
        [layer, f"{seen['excess_before']:.2f}", *(f"{row['energies'][layer]['excess_after']:.2f}" for row in rows)]
        for layer, seen in rows[0]["energies"].items()
    ]
    return table(["layer", "before", *labels], body)


def values() -> str:
    """Seconds per fact of the value optimisation, both ways, out of one run of the benchmark."""
    stored = load("values")
    found = {b["name"]: b for b in stored["benchmarks"]}
    alone, batched = found["test_one_by_one"], found["test_batched"]
    per = {name: b["stats"]["median"] / b["extra_info"]["facts"] for name, b in found.items()}
    ratio = per["test_one_by_one"] / per["test_batched"]
    rows = [
        ["one fact at a time, whole model", f"{alone['extra_info']['facts']}", f"{per['test_one_by_one']:.1f}", "1.0×"],
        [
            "batched, from the edited layer up",
            f"{batched['extra_info']['facts']}",
            f"{per['test_batched']:.2f}",
            f"{ratio:.1f}×",
        ],
    ]
    return table(["25 Adam steps, 2 threads", "facts", "seconds per fact", "ratio"], rows)


TABLES = {
    "values": values,
    "demo": lambda: scores("demo", ["after"]),
    "counterfact": lambda: scores("counterfact100", ["AlphaEdit + SPHERE", "AlphaEdit alone"]),
    "counterfact-energy": lambda: energies("counterfact100", ["AlphaEdit + SPHERE", "AlphaEdit alone"]),
}


def render(readme: str) -> str:
    """``readme`` with every ``<!-- table NAME -->`` … ``<!-- end -->`` filled anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table ([a-z0-9-]+) -->.*?<!-- end -->", fill, readme, flags=re.S)


def main(check: bool) -> int:
    old = README.read_text()
    new = render(old)
    if check:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
