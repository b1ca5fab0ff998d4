"""The examples run as their first lines say, and what they print is true."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

NUMBER = r"[-+]?\d+\.\d+(?:e[-+]\d+)?"


@pytest.fixture
def output(root, tmp_path):
    """Runs an example in a process of its own, in an empty folder; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(root / "examples" / name), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, line)]


def test_the_regulariser_lowers_the_energy_and_leaves_the_accuracy(output):
    without, regularised, orthogonal = output("energy_regulariser.py").splitlines()
    _, accuracy, energy = numbers(without)
    _, accuracy_with, energy_with = numbers(regularised)
    assert min(accuracy, accuracy_with) > 0.95 and abs(accuracy - accuracy_with) < 0.01
    assert numbers(orthogonal) == [pytest.approx(1 / 2**0.5, abs=1e-5)]
    assert energy_with < energy - 0.01


def test_the_energies_of_a_safetensors_file(output, tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"same": torch.ones(2, 3), "right": torch.eye(4), "bias": torch.ones(4), "long": torch.ones(10_001, 1)}
    save_file(tensors, tmp_path / "some.safetensors")
    rows = {
        line.split("  ")[-1].split()[0]: line
        for line in output("checkpoint_energy.py", "some.safetensors").splitlines()
    }
    assert set(rows) == {"weight", "same", "right", "long"}
    assert numbers(rows["right"])[0] == pytest.approx(12 / 2**0.5, abs=0.1)
    assert float(rows["right"].split()[1].rstrip("%")) == pytest.approx(0, abs=1e-4)
    assert numbers(rows["same"])[0] == pytest.approx(2e6)  # two equal rows: the least distance is 1e-6
    assert "more than 10000 rows" in rows["long"]


def test_the_energies_of_the_demo_model(output):
    _, *lines = output("checkpoint_energy.py").splitlines()
    excesses = {line.split()[-1]: float(line.split()[1].rstrip("%")) for line in lines if "more than" not in line}
    assert len(excesses) == 30 * 7 and len(lines) - len(excesses) == 2  # embedding and head
    down = {name: excess for name, excess in excesses.items() if "down_proj" in name}
    assert len(down) == 30 and all(0 < excess < 1 for excess in down.values())


def test_the_published_formula_and_its_replacement_agree(output):
    directions, *sides = output("published_projection.py").splitlines()
    assert re.fullmatch(r"directions: \d+ of 1536", directions)
    assert [side.split(":")[0] for side in sides] == ["formula", "drop-in"]
    assert all(numbers(side)[1] < 1e-5 for side in sides)


def test_one_edit_is_made_and_undone(output):
    before, edited, reverted = output("one_edit.py").splitlines()
    assert "Lisbon" not in before and before.endswith(" 0 weights changed")
    assert "The capital of Mali is Lisbon" in edited and edited.endswith(" 5 weights changed")
    assert reverted.removeprefix("reverted") == before.removeprefix("before")


def test_a_run_is_rolled_back_stopped_and_resumed(output, tmp_path):
    lines = output("stop_and_resume.py").splitlines()
    whole, rolled, stopped, resumed, report = (line.split(": ", 1)[1] for line in lines)
    assert re.fullmatch(r"32 batches, [0-9a-f]{16}", whole) and rolled == "1 batch kept"
    # Batch 3 was on the disk; the interrupt undoes it where the journal does not have it yet.
    assert re.fullmatch(r"status 130, ([2-9]|[12]\d|3[01]) batches kept", stopped)
    assert resumed == whole
    assert "<html" in (tmp_path / report).read_text(encoding="utf-8")


def test_ones_own_method_is_used_and_caps_what_it_writes(output):
    lines = output("own_method.py").splitlines()
    moved = [numbers(line)[0] for line in lines if line.startswith("layer")]
    assert len(moved) == 5 and all(0 < share <= 2 * 0.6 for share in moved)
    facts = [re.fullmatch(r"wanted '(.+)': '(.+)'", line) for line in lines if line.startswith("wanted")]
    assert len(facts) == 4 and sum(fact[1] in fact[2] for fact in facts) >= 3


def test_the_shell_runs_ones_own_method_as_the_example_says(root, tmp_path):
    text = (root / "examples" / "own_method.py").read_text(encoding="utf-8")
    folder, line = re.search(r"^ +cd (\S+)\n +sphere-edit (.+)$", text, re.MULTILINE).groups()
    words = [str(tmp_path / "capped") if word == "capped" else word for word in line.split()]
    command = [sys.executable, "-m", "sphere_edit", *words, "--dry-run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=root / folder, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "nothing stands in the way" in done.stdout + done.stderr
    assert "mymethods.capped:CappedRidge" in done.stdout
    refused = subprocess.run([*command, "--set", "cap=2"], cwd=root / folder, env=env, text=True, capture_output=True)
    assert refused.returncode == 1 and "cap: expected" in refused.stderr


def test_every_example_is_short_and_listed(root):
    listed = (root / "docs" / "examples.md").read_text(encoding="utf-8")
    examples = sorted((root / "examples").rglob("*.py"))
    assert len([path for path in examples if path.parent.name == "examples"]) == 6
    for path in examples:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path
        assert f"(../{path.relative_to(root).as_posix()})" in listed, path
