"""``docs/models.md``, from the stored rows of the census and of SmolLM2's twins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.collect import RESULTS
from benchmarks.kernel_tables import filled, table
from benchmarks.models.forms import FORMS

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
# Models with trained weights that the studies edit.
_REAL = {"llama": "SmolLM2-135M", "gemma3_text": "Gemma-3-270M"}
# Kinds of reasons for a refusal or a family that was not built, by words of the reason.
_KINDS = {
    r"stacked experts": "experts, or other weights of three dimensions",
    r"padding on the left": "positions counted by columns: what a row says changes with the padding before it",
    r"do not make its logits": "something between blocks and logits, as a head with layers of its own",
    r"no final norm": "no final norm: an encoder, or norms after each sum",
    r"no MLP down-projection|candidates for": "no dense MLP in every block",
    r"parameters with small sizes": "large even with small sizes: parts beside the text model",
}


def stored(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def agrees(row: dict[str, Any]) -> bool:
    """Whether whole forward passes agree with the editor, only the edited maps changed, and the revert was exact."""
    return abs(row["nll_told"] - row["nll_found"]) < 2e-3 and row["only_its_maps"] and row["reverted"]


def edited() -> str:
    """Families that were edited, with the evidence."""
    twins = {row["family"] for row in stored("twins")}
    body = []
    for row in stored("models"):
        if row["outcome"] == "edited":
            name, form = row["family"], FORMS.get(row["family"])
            evidence = [f"random: {row['learned']} of 2 facts, {_yes(agrees(row))}"]
            if form:
                evidence.append(f"twin of a trained tiny {form.original.capitalize()}")
            if name in twins:
                evidence.append("twin of SmolLM2")
            if name in _REAL:
                evidence.append(f"real: {_REAL[name]}")
            body.append([f"`{name}`", f"`{row['map']}`", "; ".join(evidence)])
    return table(["model type", "edited map", "evidence"], body)


def twins() -> str:
    """The same edits on SmolLM2 and on the twins."""
    body = []
    for row in stored("twins"):
        cells = [f"`{row['family']}`", row["pattern"], f"{row['difference_before']:.1e}"]
        cells += [f"{row['learned']} / {row['learned_of_original']} of {row['edits']}"]
        cells += [f"{row['nll']:.4f} / {row['nll_of_original']:.4f}"]
        body.append([*cells, f"{row['difference_after']:.1e}", f"{row['moved']:.1f}"])
    head = [
        "model type",
        "in its blocks",
        "logits before, difference",
        "learned, twin / SmolLM2",
        "NLL, twin / SmolLM2",
    ]
    return table([*head, "logits after, difference", "moved by the edits"], body)


def refused() -> str:
    return _others("refused")


def failed() -> str:
    return _others("failed")


def not_built() -> str:
    return _others("not built")


def _others(outcome: str) -> str:
    """Families by the kind of the reason, with one reason as an example."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in stored("models"):
        if row["outcome"] == outcome:
            kind = next((kind for pattern, kind in _KINDS.items() if re.search(pattern, row["why"])), "")
            groups.setdefault(kind or row["why"], []).append(row)
    body = []
    for kind, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = ", ".join(f"`{row['family']}`" for row in rows)
        body.append([names, "" if kind == rows[0]["why"] else kind, _short(rows[0]["why"])])
    return table(["model types", "kind", "as it was said (of the first)"], body) if body else "None."


def _short(text: str, width: int = 160) -> str:
    text = text.replace("|", "/").replace("<", "‹").replace("`", "'")
    return text if len(text) <= width else text[: width - 1] + "…"


def _yes(agreed: bool) -> str:
    return "forward pass agrees" if agreed else "forward pass does NOT agree"


def counts() -> str:
    """Number of families of each outcome."""
    rows = stored("models")
    outcomes = ("edited", "refused", "failed", "not built")
    versions = sorted({row["transformers"] for row in rows})
    body = [[outcome, str(sum(row["outcome"] == outcome for row in rows))] for outcome in outcomes]
    return table([f"transformers {', '.join(versions)}", "model types"], body)


TABLES = {f"models-{f.__name__.replace('_', '-')}": f for f in (counts, edited, twins, refused, failed, not_built)}


def render(page: str) -> str:
    """``page`` with all tables rewritten."""
    return filled(page, lambda name: TABLES[name]())


def write() -> None:
    PAGE.write_text(render(PAGE.read_text()))
