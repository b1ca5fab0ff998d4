"""Kernels with one thing wrong: each is caught, by the check that was written for it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import toolchain
from mutants import MUTANTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing())),
]


@pytest.fixture(scope="module")
def outcomes(kernels, tmp_path_factory):
    """What the checks say of each mutant; two are made at a time."""
    folder = tmp_path_factory.mktemp("mutants")
    flags = toolchain.precompiled(folder, "-O0", "-w")

    def outcome(name):
        mutant, place = MUTANTS[name], folder / name.replace(" ", "_")
        csrc = toolchain.twin(place, mutant.file, mutant.before, mutant.after)
        changed = toolchain.compiled(csrc / f"cuda/{mutant.unit}.cu", place, *flags, csrc=csrc)
        # The mutant first: of functions that several units have, the linker takes the first.
        names = [source.stem for source in (*toolchain.KERNELS, toolchain.CHECKS)]
        parts = [changed, *(kernels[name] for name in names if name != mutant.unit)]
        env = os.environ | {"CUDA_CPU_THREADS": "1"}
        return toolchain.run(toolchain.linked(parts, place / "check"), "all", mutant.check, env=env, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(outcome, name) for name in MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_caught(outcomes, name):
    done, mutant = outcomes[name].result(), MUTANTS[name]
    print(done.stderr)
    assert done.returncode in (1, 2), f"{done.returncode}: {done.stdout}{done.stderr}"
    assert done.stderr.startswith(mutant.check)
    assert mutant.shows in done.stderr
