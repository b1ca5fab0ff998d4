"""Builds the site: ``python docs/make_site.py`` writes ``build/site``. Warnings are errors.

Pages link to one another, to sources and to plots by their paths in the repository, so the links also work where the
repository is browsed. The site keeps these paths: the pages that `zensical.toml` lists, and every file that they link
to, are copied to ``build/pages``, and Zensical renders that folder. Needs Python 3.11 or later, as Zensical does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "zensical.toml"


def listed(navigation: list[dict[str, Any]]) -> Iterator[str]:
    """The pages of a navigation, nested or not."""
    for entry in navigation:
        for page in entry.values():
            yield from [page] if isinstance(page, str) else listed(page)


def linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not re.match(r"https?:|mailto:", target):
            yield (page.parent / target).resolve()


def stage(folder: Path, pages: list[str]) -> None:
    """Copy pages, and the files that they link to, to their own paths below ``folder``.

    Raises:
        ValueError: a link leads to a page that is not listed, or to something that is not a file of the repository.
    """
    for page in pages:
        for file in [ROOT / page, *linked(ROOT / page)]:
            if not file.is_file() or not file.is_relative_to(ROOT):
                raise ValueError(f"{page}: expected links to files of the repository, got {file}")
            path = file.relative_to(ROOT)
            if path.suffix == ".md" and path.as_posix() not in pages:
                raise ValueError(f"{page} links to {path}, which the navigation of {CONFIG.name} does not list")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)


def main() -> int:
    project = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]
    folder = ROOT / project["docs_dir"]
    shutil.rmtree(folder, ignore_errors=True)
    stage(folder, list(listed(project["nav"])))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(CONFIG)]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, end="")
    # Zensical counts the warnings of its own, and not those about docstrings.
    return done.returncode or int("griffe: " in done.stdout)


if __name__ == "__main__":
    sys.exit(main())
