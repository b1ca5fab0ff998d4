"""The rooms of both packages: nothing imports upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. A package's own modules are below its rooms ("") but for those of its front, which are above.
ROOMS = {
    "python/sphere_edit": [
        *["", "data", "model", "methods", "targets", "evaluation", "editing", "runs", "report", "experiments", "cli"],
    ],
    "sphere_kernels": [
        *["", "_common", "_backends", "_products", "energy", "gram", "directions", "projection", "streaming"],
    ],
}
FRONT = {"python/sphere_edit": ["__init__", "__main__"], "sphere_kernels": ["__init__", "collect_env", "published"]}


@pytest.fixture(params=ROOMS)
def package(request) -> str:
    return request.param


def test_nothing_imports_upward(package):
    folder, rooms = ROOT / package, ROOMS[package]
    found = [
        f"{path.relative_to(folder)}:{line} imports {module}"
        for path in sorted(folder.rglob("*.py"))
        if path.parent != folder or path.stem not in FRONT[package]
        for line, module in _imports(path, folder)
        if rooms.index(_room(module, folder))
        > rooms.index(path.relative_to(folder).parts[0] if path.parent != folder else "")
        or module.split(".")[1] in FRONT[package]
    ]
    assert found == []


def test_every_room_is_known(package):
    assert {path.parent.name for path in (ROOT / package).glob("*/__init__.py")} == set(ROOMS[package]) - {""}


def test_an_operation_calls_no_other_implementation_of_its_own():
    """What a backend of one operation needs of another's lies in a room below both."""
    folder, impls = ROOT / "sphere_kernels", {"reference", "native", "triton", "cuda"}
    found = [
        f"{path.relative_to(folder)}:{line} imports {module}"
        for path in sorted(folder.rglob("*.py"))
        if path.stem in impls and not path.parent.name.startswith("_")
        for line, module in _imports(path, folder)
        if not module.split(".")[1].startswith("_") and impls & set(module.split(".")[2:])
    ]
    assert found == []


def _imports(path: Path, folder: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == folder.name:
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.startswith(f"{folder.name}."))


def _room(module: str, folder: Path) -> str:
    second = module.split(".")[1]
    return second if (folder / second).is_dir() else ""
