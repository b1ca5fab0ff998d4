"""Every figure in a table, and every plot, comes from a stored row."""

from __future__ import annotations

import json
import re

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


def test_the_figures_of_the_readme_are_stored():
    """README and the page of studies state a few figures in their prose."""

    def share(study: str, run: str, score: str = "efficacy_accuracy") -> str:
        found = json.loads((tables.STUDIES.parent / f"results/{study}.json").read_text())["runs"][run]["after"]
        return f"{100 * found['scores'][score]['mean']:.1f} ± {100 * found['scores'][score]['stderr']:.1f}"

    sphere, alone = ("AlphaEdit + SPHERE", "AlphaEdit")
    readme = " ".join((tables.ROOT / "README.md").read_text().split())
    assert (
        f"answers {share('loop_scale', sphere)} % of the facts with SPHERE and {share('loop_scale', alone)} %" in readme
    )
    assert {share("loop", run) for run in (sphere, alone)} == {"91.5 ± 2.0"} and "both answer 91.5 ± 2.0 %" in readme
    paraphrases = [share("loop", run, "generalization_accuracy") for run in (sphere, alone)]
    assert "({} against {} %)".format(*paraphrases) in readme
    rows = tables.PAGE.read_text().splitlines()
    energy = next(row.split(" | ") for row in rows if row.startswith("| 4096 × 1024 | "))
    directions = next(row.split(" | ") for row in rows if row.startswith("| 1024 × 3584 | 4268"))
    assert f"takes {energy[2]} ms, {energy[3].rstrip('×')} times less" in readme
    assert f"take {directions[2]} ms, {float(directions[3].rstrip('×')):.0f} times less" in readme


def test_a_changed_figure_is_noticed():
    page = tables.PAGE.read_text()
    line = next(line for line in page.splitlines() if line.startswith("| perplexity"))
    changed = page.replace(line, line[:-3] + "9 |")
    assert changed != page and tables.render(changed) == page
