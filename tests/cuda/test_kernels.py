"""The kernels on the CPU: in every order of threads, under sanitizers, and as other compilers and grids have them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import toolchain
from mutants import RACES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing())),
]
SOURCES = [*toolchain.KERNELS, toolchain.CHECKS]


def check(program, orders="all", only=""):
    done = toolchain.run(program, orders, only, env=os.environ | {"CUDA_CPU_THREADS": "2"})
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-6000:]


def test_every_order_gives_the_same_bits(kernels, tmp_path):
    parts = [kernels[source.stem] for source in SOURCES]
    check(toolchain.linked(parts, tmp_path / "check"))


@pytest.fixture(scope="module", params=("thread", "address,undefined"))
def sanitized(request, tmp_path_factory):
    """The name of a sanitizer, its flags, object files."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ("-Og", "-g", f"-fsanitize={request.param}", "-fno-sanitize-recover=all")
    (folder / "empty.cpp").write_text("int main() {}")
    if toolchain.run(*toolchain.CXX, *flags, folder / "empty.cpp", "-o", folder / "empty").returncode:
        pytest.skip("this compiler has no sanitizers")
    return request.param, flags, toolchain.objects(SOURCES, folder, *flags)


def test_under_sanitizers(sanitized, tmp_path):
    name, flags, parts = sanitized
    check(toolchain.linked(list(parts.values()), tmp_path / "check", *flags), "few")
    for mutant in RACES.values() if name == "thread" else ():
        place = tmp_path / mutant.unit
        csrc = toolchain.twin(place, mutant.file, mutant.before, mutant.after)
        changed = toolchain.compiled(csrc / f"cuda/{mutant.unit}.cu", place, *flags, csrc=csrc)
        others = [part for stem, part in parts.items() if stem != mutant.unit]
        program = toolchain.linked([changed, *others], place / "check", *flags)
        assert mutant.shows in toolchain.run(program, "few", mutant.check).stderr


def test_surplus_blocks_and_fused_multiply_adds(kernels, tmp_path):
    """A grid of two dimensions holds more blocks than there are; nvcc fuses wherever it can."""
    csrc = toolchain.twin(tmp_path, "launching.cuh", "ACROSS = int64_t(1) << 30", "ACROSS = 3")
    cpuinfo = Path("/proc/cpuinfo")
    fma = cpuinfo.exists() and re.search(r"^flags\s*:.*\bfma\b", cpuinfo.read_text(), re.MULTILINE)
    sources = [csrc / "cuda" / source.name for source in toolchain.KERNELS]
    flags = ("-Og", *(("-mfma", "-ffp-contract=fast") if fma else ()))
    parts = toolchain.objects(sources, tmp_path, *flags, csrc=csrc)
    program = toolchain.linked([*parts.values(), kernels[toolchain.CHECKS.stem]], tmp_path / "check")
    for kind in ("energy", "update", "product"):  # not the far ones, where a block is known by its number
        check(program, "few", kind)
