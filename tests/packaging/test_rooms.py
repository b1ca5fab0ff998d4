"""The rooms of `sphere_edit`: nothing imports upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python/sphere_edit"
# From the ground up; modules without a room are below them all, and the package's own front is above.
ROOMS = ["", "data", "model", "methods", "targets", "evaluation", "editing", "runs", "report", "experiments", "cli"]


def test_nothing_imports_upward():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} imports {module}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
        for line, module in _imports(path)
        if ROOMS.index(_room(module))
        > ROOMS.index(path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else "")
    ]
    assert found == []


def test_every_room_is_known():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS) - {""}


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sphere_edit":
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"


def _room(module: str) -> str:
    second = module.split(".")[1]
    return second if (PACKAGE / second).is_dir() else ""
