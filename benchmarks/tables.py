"""Write the tables of `docs/benchmarks.md`, of the page of studies and of `docs/reference.md`:
``python -m benchmarks.tables`` (``--check`` only compares)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import kernel_tables, streaming_tables
from benchmarks.kernel_tables import filled, table
from sphere_edit.config import METHODS, TARGETS, declarations
from sphere_edit.evaluation.metrics import SCORES
from sphere_edit.events import KINDS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs/benchmarks.md"
REFERENCE = ROOT / "docs" / "reference.md"
STUDIES = Path(__file__).parent / "study" / "README.md"


def load(name: str) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return stored


def score(evaluation: dict[str, Any], name: str) -> str:
    found = evaluation["scores"][name]
    return "–" if found["mean"] is None else f"{found['mean']:.3f} ± {found['stderr']:.3f}"


def label(row: dict[str, Any]) -> str:
    targets = ", optimised targets" if row["settings"].get("targets") == "optimised" else ""  # version 0.1 stored none
    return ("AlphaEdit + SPHERE" if row["settings"]["sphere"] else "AlphaEdit alone") + targets


def scores(stored: dict[str, Any]) -> str:
    """Scores before the edits and after each run."""
    rows = stored["rows"]
    before, afters = rows[0]["evaluations"]["before"], [row["evaluations"]["after"] for row in rows]
    counts = [str(before["scores"][metric]["n"]) for metric in SCORES]
    body = [
        [metric.replace("_", " "), *(score(e, metric) for e in [before, *afters]), n]
        for metric, n in zip(SCORES, counts, strict=True)
    ]
    body.append(["perplexity", *(f"{e['perplexity']:.2f}" for e in [before, *afters]), ""])
    return table(["", "before", *map(label, rows), "n"], body)


def energies(stored: dict[str, Any]) -> str:
    """Excess energy per layer, before the edits and after each run."""
    rows = stored["rows"]
    body = [
        [layer, f"{seen['excess_before']:.2f}", *(f"{row['energies'][layer]['excess_after']:.2f}" for row in rows)]
        for layer, seen in rows[0]["energies"].items()
    ]
    return table(["layer", "before", *map(label, rows)], body)


def per_unit(stored: dict[str, Any], unit: str) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """By benchmark: the noted fields, and median seconds per ``unit``; the fields hold the number of units."""
    found = {b["name"]: b["extra_info"] for b in stored["benchmarks"]}
    return found, {b["name"]: b["stats"]["median"] / b["extra_info"][unit] for b in stored["benchmarks"]}


def values(stored: dict[str, Any]) -> str:
    """Seconds per fact of the value optimisation, both ways, from one run of the benchmark."""
    ways = {"test_one_by_one": "one fact at a time, whole model", "test_batched": "batched, from the edited layer up"}
    found, per = per_unit(stored, "facts")
    rows = []
    for name, way in ways.items():
        info = found[name]
        ratio = f"{per['test_one_by_one'] / per[name]:.1f}×"
        rows.append([way, f"{info['facts']}", ", ".join(map(str, info["shared_loss"])), f"{per[name]:.2f}", ratio])
    info = found["test_batched"]
    head = f"{info['steps']} steps, {info['threads']} threads"
    return table([head, "facts", "losses of the shared facts", "seconds per fact", "ratio"], rows)


def targets(stored: dict[str, Any]) -> str:
    """A batch of edits by the source of the targets, from one run of the benchmark."""
    ways = {
        "test_edits[optimised]": "optimised, as published",
        "test_edits[closed_loop_model]": "closed loop, in fp32",
        "test_edits[closed_loop]": "closed loop",
        "test_edits[gradient]": "gradient (UltraEdit)",
    }
    found, per = per_unit(stored, "facts")
    rows = []
    for name, way in ways.items():
        if name not in found:
            continue
        info, ratio = found[name], per["test_edits[optimised]"] / per[name]
        flops = "–" if info["gflops_per_fact"] is None else f"{info['gflops_per_fact']:.1f}"
        said = f"{way}, in {info['arithmetic']}" if info["arithmetic"] == "bfloat16" else way
        names = ("efficacy_accuracy", "generalization_accuracy", "specificity_success")
        scored = [f"{info['scores'][score]:.3f}" for score in names]
        speed = [f"{per[name]:.3f}", f"{1 / per[name]:.1f}", f"{ratio:.1f}×"]
        rows.append([said, *speed, f"{info['passes']}", flops, *scored])
    head = [f"{found['test_edits[closed_loop]']['threads']} threads", "seconds per fact", "edits per second", "ratio"]
    head += ["passes", "Gflop per fact", "efficacy accuracy", "generalization accuracy", "specificity success"]
    return table(head, rows)


def evaluation(stored: dict[str, Any]) -> str:
    """Milliseconds per scored target and, if measured, per written answer, both ways, from one run."""
    ways = {
        "test_one_by_one": "one forward pass per prompt and target",
        "test_batched": "batched, prompts run once",
        "test_answers_one_by_one": "answers in place of targets, one prompt at a time",
        "test_answers_batched": "answers, batched",
    }
    found, per = per_unit(stored, "targets")
    rows = []
    for name, way in ways.items():
        if name not in found:
            continue
        info, ratio = found[name], per[name.replace("batched", "one_by_one")] / per[name]
        floor = "5×" if name.endswith("batched") else ""
        rows.append([way, f"{info['facts']}", f"{info['targets']}", f"{1e3 * per[name]:.1f}", f"{ratio:.1f}×", floor])
    head = f"{found['test_batched']['threads']} threads"
    return table([head, "facts", "targets", "ms per target", "ratio", "floor"], rows)


def preset(stored: dict[str, Any]) -> str:
    """The figures that decided the preset."""
    names = [name for name in SCORES if name != "generalization_accuracy"]
    body = []
    for row in stored["rows"]:
        means = [f"{row['scores'][name]['mean']:.3f}" for name in names]
        body.append([row["name"], *means, f"{row['perplexity']:.2f}"])
    return table(["settings", *(name.replace("_", " ") for name in names), "perplexity"], body)


# Name: (file of its rows, writer).
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "values": ("values", values),
    "targets": ("targets", targets),
    "evaluation": ("evaluation", evaluation),
    "preset": ("preset", preset),
    "demo": ("demo", scores),
    "counterfact": ("counterfact100", scores),
    "counterfact-energy": ("counterfact100", energies),
    "energy": ("energy", kernel_tables.energy),
    "energy-gradient": ("energy", kernel_tables.gradient),
    "energy-backends": ("energy", kernel_tables.backends),
    "gram": ("gram", kernel_tables.gram),
    "gram-update": ("gram", kernel_tables.gram_update),
    "directions": ("directions", kernel_tables.directions),
    "projection": ("projection", kernel_tables.projection),
    "projection-alone": ("projection", kernel_tables.projection_alone),
    "overhead": ("overhead", kernel_tables.overhead),
    "streaming": ("streaming", kernel_tables.streaming),
    "streaming-seldom": ("streaming", kernel_tables.streaming_seldom),
    "precision": ("precision", streaming_tables.precision),
    "growth": ("growth", streaming_tables.growth),
    "share": ("demo", streaming_tables.share),
}


def measured() -> list[str]:
    """Names of the tables with stored rows."""
    return [name for name, (file, _) in TABLES.items() if (RESULTS / f"{file}.json").exists()]


def render(page: str) -> str:
    """``page`` with all tables rewritten."""

    def write(name: str) -> str:
        file, made = TABLES[name]
        return made(load(file))

    return filled(page, write)


def training(stored: dict[str, Any]) -> str:
    """Training of the small model of the studies."""
    known = [f"{100 * share:.0f} %" for share in stored["known"].values()]
    minutes = [f"{stored[seconds] / 60:.1f}" for seconds in ("seconds", "processor_seconds")]
    head = ["parameters", "steps", f"minutes, {stored['threads']} threads", "of a processor", *stored["known"]]
    return table(head, [[f"{stored['parameters']:,}", f"{stored['steps']:,}", *minutes, *known]])


def directions(stored: dict[str, Any]) -> str:
    """Overlap of the final principal directions with the pretrained weight's and the edits', as means over layers."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in stored["rows"]:
        runs.setdefault(row["run"], []).append(row)
    head = ["", "r before", "r after", "of the weight before", "of the edits", "‖ΔW‖ / ‖W‖", "ΔW inside those before"]
    rows = []
    for name, layers in runs.items():
        mean = {key: sum(row[key] for row in layers) / len(layers) for key in layers[0] if key != "run"}
        shares = [f"{100 * mean[key]:.1f} %" for key in ("of_before", "of_edits")]
        ranks = [f"{mean[key]:.0f}" for key in ("rank_before", "rank")]
        rows.append([name, *ranks, *shares, f"{mean['grown']:.1f}", f"{100 * mean['inside']:.2g} %"])
    return table(head, rows)


_OF_STUDIES = {"training": training, "scale-directions": directions, "counterfact-directions": directions}


def render_studies(page: str) -> str:
    """``page`` with the results of studies and files rewritten."""

    def write(name: str) -> str:
        path, made = STUDIES.parent / "results" / name, _OF_STUDIES.get(name)
        if made:
            return made(json.loads(path.with_suffix(".json").read_text()))
        return path.with_suffix(".md").read_text().removesuffix("\n")

    return filled(page, write, "results")


def settings() -> str:
    """Every setting of a run, with the methods and targets that use the setting."""
    rows = []
    for name, setting in declarations().items():
        users = [one for one, method in METHODS.items() if name in method.settings]
        users += [f"{one} targets" for one, targets in TARGETS.items() if name in targets.settings]
        default = "none" if setting.default == () else str(setting.default).lower()
        rows.append([f"`{name}`", f"`{default}`", setting.expected, ", ".join(users), setting.doc])
    return table(["setting", "default", "may be", "only for", "what it does"], rows, "---")


def events() -> str:
    """Every event, with all fields."""
    rows = []
    for kind, known in KINDS.items():
        for name, one in known.items():
            types = " or ".join("null" if of is type(None) else of.__name__ for of in one.types)
            rows.append([f"`{kind}`", f"`{name}`", types, "" if one.always else "sometimes", one.doc])
    return table(["event", "field", "type", "there", "meaning"], rows, "---")


def render_reference(page: str) -> str:
    """``page`` with the tables of settings and events rewritten."""
    return filled(page, lambda name: {"settings": settings, "events": events}[name]())


def main(check: bool) -> int:
    changed = 0
    for path, write in ((PAGE, render), (STUDIES, render_studies), (REFERENCE, render_reference)):
        old = path.read_text()
        new = write(old)
        changed += old != new
        if not check:
            path.write_text(new)
    return changed if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
