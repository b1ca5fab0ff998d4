"""What a user gets from `pip install .`, on a machine that has neither torch nor CUDA at build time."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def build(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--quiet", "--disable-pip-version-check"]
    env = {**os.environ, "SPHERE_KERNELS_CUDA": "0", **environment}  # whatever toolkit this machine has
    return subprocess.run(command + ["-w", str(out)], env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, root, source_files) -> Path:
    """A copy, so that the build leaves nothing behind in the tree that the other tests import."""
    copy = tmp_path_factory.mktemp("tree")
    for source in source_files:
        target = copy / source.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    done = build(tree, out)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("sphere_kernels-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_it_holds_every_module_of_both_packages_and_what_they_read(wheel, root, source_files):
    expected = set()
    for package, top in (("sphere_kernels", root), ("sphere_edit", root / "python")):
        for path in source_files:
            if path.is_relative_to(top / package):
                expected.add(path.relative_to(top).as_posix())
    assert {"sphere_kernels/py.typed", "sphere_edit/py.typed", "sphere_edit/data/texts/builtin.txt"} <= expected
    assert expected - set(wheel.namelist()) == set()


def test_it_holds_the_compiled_module_once(wheel):
    compiled = [name for name in wheel.namelist() if name.endswith((".so", ".pyd"))]
    assert len(compiled) == 1 and compiled[0].startswith("sphere_kernels/_cpu.")


def test_it_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sphere_kernels", "sphere_edit"}
    assert not [name for name in wheel.namelist() if "tests/" in name or "__pycache__" in name or name.endswith(".cpp")]


def test_its_metadata(wheel, metadata):
    assert metadata["Name"] == "sphere-kernels"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "edit",
        "demo",
        "harness",
        "triton",
        "bench",
        "test",
        "lint",
        "docs",
    }
    unconditional = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert unconditional == ["torch>=2.6"]
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "sphere-edit = sphere_edit.cli.app:main" in wheel.read(entries).decode()


def test_without_a_compiler_the_build_says_what_to_do(tree, tmp_path):
    done = build(tree, tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode != 0
    assert "the compiler 'no-such-compiler' was not found" in done.stdout + done.stderr
