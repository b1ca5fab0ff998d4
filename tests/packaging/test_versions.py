"""One version, stated alike wherever it is stated."""

import re

import yaml

import sphere_kernels


def test_every_statement_of_the_version_agrees(root):
    (packaged,) = re.findall(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d\S*)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert packaged == sphere_kernels.__version__ == citation["version"] == newest[1]


def test_pins_agree_with_the_makefile(root):
    (default,) = re.findall(r"^TORCH_SPEC \?= (\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert default in (root / "constraints.txt").read_text().splitlines()


def test_every_pin_is_exact(root):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))
