"""Figures in the README are those of the stored rows."""

from __future__ import annotations

from benchmarks import tables


def test_readme_tables_are_the_stored_rows():
    readme = tables.README.read_text()
    assert tables.render(readme) == readme
    assert readme.count("<!-- table ") == len(tables.TABLES)


def test_a_changed_figure_is_noticed():
    readme = tables.README.read_text()
    line = next(line for line in readme.splitlines() if line.startswith("| perplexity"))
    assert tables.render(readme.replace(line, line[:-3] + "9 |")) != readme.replace(line, line[:-3] + "9 |")
