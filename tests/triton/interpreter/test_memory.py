"""No access outside a tensor and no offset of 32 bits; and the tests that say so notice when there is one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sphere_kernels

PACKAGE = Path(sphere_kernels.__file__).parent
SCRIPT = Path(__file__).parent / "memory.py"
# A file, what stands in it, and what a broken twin has instead.
WITHOUT_A_MASK = [
    ("common.py", "m_i = (o_i < n)[:, None]", "m_i = (o_i >= 0)[:, None]"),
    ("rows.py", "m_r = (o_r < total)[:, None]", "m_r = (o_r >= 0)[:, None]"),
    ("pairs.py", "b_cols, mask=o_j < n)", "b_cols)"),
    ("slopes.py", "(o_c < cols)[:, None] & ", ""),
    ("gram.py", "mask=(o_j < n)[:, None] & ", "mask="),
    ("near.py", "mask=(o_j < n)[:, None] & m_k[None, :]", "mask=(o_j >= 0)[:, None] & m_k[None, :]"),
    ("product.py", "m_k = o_k < depth - k", "m_k = o_k >= 0"),
]  # fmt: skip


def run(what, package=PACKAGE.parent):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    env |= {"TRITON_INTERPRET": "1", "SPHERE_KERNELS_IMPL": "reference", "SPHERE_KERNELS_DOT": "auto"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), what]
    return subprocess.run(command, env=env, cwd=package, capture_output=True, text=True)


def noticed(done):
    """It died of the access, or what it wrote to the wrong place is missed elsewhere; not of anything else."""
    assert done.returncode == -signal.SIGSEGV or "Tensor-likes are not close" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("what", ("guarded", "far apart"))
def test_the_kernels_stay_inside(what):
    done = run(what)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


@pytest.fixture
def twin(tmp_path):
    """A copy of the package with other kernel sources."""
    shutil.copytree(PACKAGE, tmp_path / "sphere_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def made(pattern, new, name="*.py"):
        for path in (tmp_path / "sphere_kernels/_backends/triton").glob(name):
            path.write_text(path.read_text().replace(pattern, new))
        return tmp_path

    return made


@pytest.mark.parametrize(("name", "mask", "without"), WITHOUT_A_MASK, ids=[row[0] for row in WITHOUT_A_MASK])
def test_a_missing_mask_is_noticed(name, mask, without, twin):
    assert mask in (PACKAGE / "_backends/triton" / name).read_text()
    noticed(run("guarded", twin(mask, without, name)))


def test_a_narrow_offset_is_noticed(twin):
    assert re.search(r"tl\.int64", (PACKAGE / "_backends/triton/rows.py").read_text())
    noticed(run("far apart", twin(".to(tl.int64)", ".to(tl.int32)")))
