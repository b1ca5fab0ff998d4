"""The workflows, hooks and forms are what their readers expect, and call only what exists.

They cannot be run here. ``actionlint`` and ``check-jsonschema`` check more: their schemas are not ours to keep.
"""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

WORKFLOWS = ["ci.yml", "docs.yml", "wheels.yml"]


@pytest.fixture(params=WORKFLOWS)
def workflow(request, root) -> dict:
    return yaml.safe_load((root / ".github/workflows" / request.param).read_text(encoding="utf-8"))


@pytest.fixture
def targets(root) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (root / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_no_workflow_is_forgotten(root):
    assert sorted(path.name for path in (root / ".github/workflows").iterdir()) == WORKFLOWS


def test_every_job_may_only_read_and_ends(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]  # YAML 1.1 reads the key "on" so
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 120, name
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}, name


def test_actions_are_githubs_own_and_pinned_to_a_major_version(workflow):
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step["uses"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_what_is_run_exists(workflow, root, targets):
    """Make targets, scripts of ours, and modules that the job has installed before."""
    for name, job in workflow["jobs"].items():
        modules = {"pip"}
        for line in (line for step in job["steps"] for line in step.get("run", "").splitlines()):
            words = shlex.split(line)
            if words[0] == "make":
                assert set(words[1:]) <= targets, f"{name}: {line}"
            elif words[0] == "bash":
                assert (root / words[1]).is_file(), f"{name}: {line}"
            elif words[:2] == ["python", "-m"]:
                assert words[2] in modules, f"{name}: {line}"
                if words[2:4] == ["pip", "install"]:
                    modules |= {re.split("[=<>]", word)[0] for word in words[4:]}
            else:
                files = [word.rstrip(";") for word in words if re.fullmatch(r"\S+\.(?:py|toml);?", word)]
                assert "grep" in words[:2] and [file for file in files if (root / file).is_file()], f"{name}: {line}"


def test_ci_runs_the_gate(root):
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert [step["run"] for step in steps(workflow) if "run" in step] == ["bash .ci/run"]


def test_the_release_check_looks_for_what_setup_py_says(root):
    text = (root / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    assert "grep -n 'example.org' setup.py" in text
    assert re.search(r'^REPOSITORY = "https://', (root / "setup.py").read_text(), re.MULTILINE)
    assert len(re.findall(r'^version = "\d+\.\d+\.\d+"$', (root / "pyproject.toml").read_text(), re.MULTILINE)) == 1


def test_wheels_leave_torchs_openmp_out_and_are_tested_by_what_exists(root):
    text = (root / "pyproject.toml").read_text()
    (repair,) = re.findall(r'^repair-wheel-command = "(.+)"$', text, re.MULTILINE)
    assert repair.split()[:4] == ["auditwheel", "repair", "--exclude", "libgomp.so.1"]
    (command,) = re.findall(r'^test-command = "(.+)"$', text, re.MULTILINE)
    tested = re.findall(r"\{project\}/(\S+)", command)
    assert tested and all((root / path).is_dir() for path in tested)


def test_hooks_run_make_targets(root, targets):
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    for repo in hooks["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            command, target = hook["entry"].split()
            assert command == "make" and target in targets


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_forms_ask_for_something(name, root):
    form = yaml.safe_load((root / ".github/ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert any(part.get("validations", {}).get("required") for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)
