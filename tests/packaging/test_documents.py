"""The pages: whatever they name exists, their code runs, the site lists them, and the README stays short."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import sphere_edit
import sphere_kernels
from sphere_kernels import env, streaming

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]
SUFFIXES = (".py", ".md", ".toml", ".txt", ".cff", ".cpp", ".h", ".cu", ".yaml", ".json", ".html")
# Written by the commands a document shows, so not there beforehand.
OUTPUT = ("runs/", ".venv", "build/")
RUN_FOLDER = {"before.json", "config.yaml", "report.html"}


@pytest.fixture(params=DOCUMENTS)
def page(request, root) -> Path:
    return root / request.param


@pytest.fixture
def text(page) -> str:
    return page.read_text(encoding="utf-8")


def code(text: str) -> str:
    """Everything set in backticks, inline or fenced, with continued lines joined."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(fenced + re.findall(r"`([^`\n]+)`", rest)).replace("\\\n", " ")


@functools.cache
@functools.cache
def help_of(*arguments: str) -> str:
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    program = "from sphere_edit.cli.app import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--help"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_targets_exist(text, root):
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for line in re.findall(r"^(?:\S+=\S+ )*make\b([^#\n|&;]*)", code(text), re.MULTILINE):
        for word in shlex.split(line):
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), f"make {word}"


def test_paths_exist(text, root):
    tops = {path.name for path in root.iterdir()}
    for word in re.findall(r"`([^`\s]+)`", text):
        if not re.fullmatch(r"[\w./*<>{},-]+", word) or word.startswith((*OUTPUT, "/", "..")):
            continue
        if word in RUN_FOLDER:
            continue
        if "/" in word.strip("/") and word.split("/")[0] in tops or word.endswith(("/", *SUFFIXES)):
            pattern = re.sub(r"<[^>]*>|\{[^}]*\}", "*", word)
            found = any(True for base in (root, root / "python") for _ in base.glob(pattern.rstrip("/")))
            assert found, f"{word} does not exist"


def test_links_lead_somewhere(page, text):
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match(r"https?://|mailto:", target) or (page.parent / target).exists(), target


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in DOCUMENTS if python_blocks(page)])
def test_code_runs(page, tmp_path):
    command = [sys.executable, "-c", "\n".join(python_blocks(page))]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_read_in_minutes(root):
    assert len((root / "README.md").read_text().split()) <= 1200


def listed_pages() -> list[str]:
    return re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text())


def test_the_site_lists_every_page_once():
    listed = listed_pages()
    assert len(listed) == len(set(listed)) and set(DOCUMENTS) <= set(listed)
    assert [page for page in listed if not (ROOT / page).is_file()] == []


def test_the_site_has_the_files_that_its_pages_link_to(tmp_path):
    pytest.importorskip("tomllib", reason="the site needs Python 3.11")
    site = load_make_site()
    site.stage(tmp_path, listed_pages())
    assert (tmp_path / "benchmarks/results/plots/retention.svg").is_file()
    with pytest.raises(ValueError, match="README.md links to docs/.+, which the navigation of zensical.toml does not"):
        site.stage(tmp_path, ["README.md"])


def load_make_site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs/make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_has_every_public_name(root):
    named = set(re.findall(r"^::: ([\w.]+)$", (root / "docs/api.md").read_text(), re.MULTILINE))
    for package in (sphere_kernels, streaming, sphere_edit):
        public = {f"{package.__name__}.{name}" for name in package.__all__ if name != "__version__"}
        assert public == {name for name in named if name.rpartition(".")[0] == package.__name__}


def test_the_environment_variables_are_those_that_are_read(root):
    rows = re.findall(r"^\| `(SPHERE_\w+)` \| (\S+) \|", (root / "docs/kernels.md").read_text(), re.MULTILINE)
    read = [(variable.name, f"`{variable.default}`" if variable.default else "none") for variable in env.VARIABLES]
    assert rows == read


def test_modules_that_are_run_exist(text):
    for name in re.findall(r"python3? -m ([\w.]+)", code(text)):
        if name.startswith("sphere_"):
            assert importlib.util.find_spec(name), name


def test_commands_and_options_exist(text):
    for line in re.findall(r"\bsphere-edit\b([^\n#|&;]*)", code(text)):
        words = line.split()
        commands = [word for word in words[:1] if re.fullmatch(r"[a-z][\w-]*", word)]
        shown = help_of(*commands)
        for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", line):
            assert re.search(rf"(?<!\S){option}(?![\w-])", shown), f"sphere-edit {' '.join(commands)} {option}"


def test_the_demo_of_the_makefile_is_a_command_that_exists(root):
    (line,) = re.findall(r"\$\(BIN\)/sphere-edit ([^\n]+)", (root / "Makefile").read_text())
    command, *rest = line.split()
    shown = help_of(command)
    for option in (word for word in rest if word.startswith("--")):
        assert re.search(rf"(?<!\S){option}(?![\w-])", shown), option
