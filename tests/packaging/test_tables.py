"""Figures in the README are those of the stored rows."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import tables
from benchmarks.models import page as models
from benchmarks.study import directions
from sphere_edit.experiments import study_results


def test_readme_tables_are_the_stored_rows():
    readme = tables.README.read_text()
    assert tables.render(readme) == readme
    assert set(re.findall("<!-- table ([a-z0-9_-]+) -->", readme)) == set(tables.measured())


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


def test_the_readme_shows_plots_that_were_drawn():
    shown = re.findall(r"\]\((benchmarks/results/plots/[^)]+)\)", tables.README.read_text())
    drawn = [f"benchmarks/results/plots/{path.name}" for path in (tables.RESULTS / "plots").glob("*")]
    assert sorted(shown) == sorted(drawn)


def test_a_changed_figure_is_noticed():
    readme = tables.README.read_text()
    line = next(line for line in readme.splitlines() if line.startswith("| perplexity"))
    assert tables.render(readme.replace(line, line[:-3] + "9 |")) != readme.replace(line, line[:-3] + "9 |")
