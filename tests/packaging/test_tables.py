"""Figures in the README are those of the stored rows."""

from __future__ import annotations

import re

from benchmarks import tables


def test_readme_tables_are_the_stored_rows():
    readme = tables.README.read_text()
    assert tables.render(readme) == readme
    assert set(re.findall("<!-- table ([a-z0-9-]+) -->", readme)) == set(tables.measured())


def test_the_page_of_studies_has_their_tables_and_plots():
    page = tables.STUDIES.read_text()
    stored = {path.stem for path in (tables.STUDIES.parent / "results").glob("*.json")}
    assert tables.render_studies(page) == page
    assert set(re.findall("<!-- results ([a-z0-9-]+) -->", page)) == stored
    assert set(re.findall(r"\]\(results/([a-z0-9-]+)\.svg\)", page)) == stored


def test_the_readme_shows_plots_that_were_drawn():
    shown = re.findall(r"\]\((benchmarks/results/plots/[^)]+)\)", tables.README.read_text())
    drawn = [f"benchmarks/results/plots/{path.name}" for path in (tables.RESULTS / "plots").glob("*")]
    assert sorted(shown) == sorted(drawn)


def test_a_changed_figure_is_noticed():
    readme = tables.README.read_text()
    line = next(line for line in readme.splitlines() if line.startswith("| perplexity"))
    assert tables.render(readme.replace(line, line[:-3] + "9 |")) != readme.replace(line, line[:-3] + "9 |")
