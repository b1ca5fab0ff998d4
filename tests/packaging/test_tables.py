"""Every figure in a table, and every plot, comes from a stored row."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.models import page as models
from benchmarks.study import directions
from sphere_edit.experiments import study_results


def test_the_page_of_benchmarks_is_the_stored_rows():
    page = tables.PAGE.read_text()
    assert tables.render(page) == page
    assert set(re.findall("<!-- table ([a-z0-9_-]+) -->", page)) == set(tables.measured())


def test_the_page_of_studies_has_their_tables_and_plots():
    page = tables.STUDIES.read_text()
    results = tables.STUDIES.parent / "results"
    stored, drawn = ({path.stem for path in results.glob(f"*.{kind}")} for kind in ("json", "svg"))
    assert tables.render_studies(page) == page
    assert set(re.findall("<!-- results ([a-z0-9_-]+) -->", page)) == stored
    assert set(re.findall(r"\]\(results/([a-z0-9_-]+)\.svg\)", page)) == drawn
    for path in results.glob("*.md"):
        assert study_results.tables(json.loads(path.with_suffix(".json").read_text())) == path.read_text()


def test_the_reference_is_what_the_code_declares():
    page = tables.REFERENCE.read_text()
    assert tables.render_reference(page) == page and "| `ridge` | `10.0` |" in page and "| `guard` | `why` |" in page


def test_the_page_of_models_is_the_stored_rows():
    page = models.PAGE.read_text()
    assert models.render(page) == page
    assert set(re.findall("<!-- table ([a-z-]+) -->", page)) == set(models.TABLES)


def test_every_model_type_that_was_edited_is_as_it_was_said():
    rows = [row for row in models.stored("models") if row["outcome"] == "edited"]
    assert len(rows) > 60 and all(models.agrees(row) for row in rows)


def test_whose_the_principal_directions_are():
    """Rows along one axis, then all of them moved far along another."""
    before = torch.eye(6, dtype=torch.float64)[0].repeat(4, 1)
    along = 10 * torch.eye(6, dtype=torch.float64)[3].repeat(4, 1)
    found = directions.whose(before, 2 * before + along, 0.5)
    assert (found["rank"], found["rank_before"]) == (1, 1)
    assert found["of_before"] == pytest.approx(4 / 104) and found["inside"] == pytest.approx(1 / 101)
    assert found["of_edits"] == pytest.approx(102**2 / (101 * 104)) and found["grown"] == pytest.approx(101**0.5)


def test_every_plot_is_shown_once():
    pages = (tables.ROOT / "README.md").read_text() + tables.PAGE.read_text()
    shown = re.findall(r"\(\S*benchmarks/results/plots/([^)]+)\)", pages)
    drawn = [path.name for path in (tables.RESULTS / "plots").glob("*")]
    assert sorted(shown) == sorted(drawn)


def test_the_figures_in_the_prose_of_readme_and_studies_are_stored():
    loop, scale = study("loop"), study("loop_scale")
    sphere, alone = "AlphaEdit + SPHERE", "AlphaEdit"
    end = {name: (percent(run["after"]["scores"]), run["after"]["perplexity"]) for name, run in scale.items()}
    half = {
        name: percent(seen["scores"]) for name, run in scale.items() for seen in run["curve"] if seen["edits"] == 10000
    }
    short = {name: percent(run["after"]["scores"]) for name, run in loop.items()}
    other = [percent(loop[name]["after"]["scores"], "generalization_accuracy") for name in (sphere, alone)]
    gained = {name: percent(study("counterfact")[name + " + SPHERE"]["less_base"]) for name in ("MEMIT", alone)}
    small = {name: run["after"]["perplexity"] for name, run in study("scale").items() if "ridge" not in name}
    worse = [small[f"{name} + SPHERE"] > value for name, value in small.items() if "SPHERE" not in name]
    assert short[sphere] == short[alone] and (sum(worse), len(worse)) == (5, 7)

    readme, studies = (" ".join((tables.ROOT / page).read_text().split()) for page in ("README.md", "docs/studies.md"))
    before = scale[alone]["before"]["perplexity"]
    for phrase in (
        f"answers {end[sphere][0]} % of the facts with SPHERE and {end[alone][0]} % without",
        f"a perplexity of {end[sphere][1]:.0f} instead of {end[alone][1]:.0f} ({before:.0f} before",
        f"both answer {short[alone]} %",
        "({} against {} %)".format(*other),
        f"MEMIT gains (accuracy +{gained['MEMIT']} points)",
        "five of seven methods end at a higher perplexity",
    ):
        assert phrase in readme
    for phrase in (
        f"with SPHERE answers {half[sphere]} % of all facts and AlphaEdit alone {half[alone]} %",
        f"after 20,000, {end[sphere][0]} and {end[alone][0]} %",
        f"learns {short[alone]} % with SPHERE and without; UltraEdit {short['UltraEdit']} %",
        f"(accuracy +{gained['MEMIT']} points) and AlphaEdit hardly (+{gained[alone]})",
        f"{percent(study('gemma')[sphere]['after']['scores'])} % of 200 facts",
    ):
        assert phrase in studies


def test_the_speeds_in_the_prose_of_the_readme_are_stored():
    readme = " ".join((tables.ROOT / "README.md").read_text().split())
    times, directions = (
        next(row.split(" | ") for row in tables.PAGE.read_text().splitlines() if row.startswith(start))
        for start in ("| 4096 × 1024 | ", "| 1024 × 3584 | 4268")
    )
    assert f"takes {times[2]} ms, {times[3].rstrip('×')} times less" in readme
    assert f"take {directions[2]} ms, {float(directions[3].rstrip('×')):.0f} times less" in readme


def study(name: str) -> dict[str, Any]:
    """The runs of a study, by name."""
    runs: dict[str, Any] = json.loads((tables.STUDIES.parent / f"results/{name}.json").read_text())["runs"]
    return runs


def percent(scores: dict[str, Any], name: str = "efficacy_accuracy") -> str:
    return f"{100 * scores[name]['mean']:.1f} ± {100 * scores[name]['stderr']:.1f}"


def test_a_changed_figure_is_noticed():
    page = tables.PAGE.read_text()
    line = next(line for line in page.splitlines() if line.startswith("| perplexity"))
    changed = page.replace(line, line[:-3] + "9 |")
    assert changed != page and tables.render(changed) == page
