"""A document that names a path, a command or an option names one that exists."""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/gpu.md", "docs/evaluation.md", "docs/models.md"]
SUFFIXES = (".py", ".md", ".toml", ".txt", ".cff", ".cpp", ".h", ".cu", ".yaml", ".json", ".html")
# Written by the commands a document shows, so not there beforehand.
OUTPUT = ("runs/", ".venv")


@pytest.fixture(params=DOCUMENTS)
def text(request, root) -> str:
    return (root / request.param).read_text(encoding="utf-8")


def code(text: str) -> str:
    """Everything set in backticks, inline or fenced, with continued lines joined."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(fenced + re.findall(r"`([^`\n]+)`", rest)).replace("\\\n", " ")


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
        if "/" in word.strip("/") and word.split("/")[0] in tops or word.endswith(("/", *SUFFIXES)):
            pattern = re.sub(r"<[^>]*>|\{[^}]*\}", "*", word)
            found = any(True for base in (root, root / "python") for _ in base.glob(pattern.rstrip("/")))
            assert found, f"{word} does not exist"


def test_links_lead_somewhere(text, root):
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match(r"https?://|mailto:", target) or (root / target).exists(), target


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
