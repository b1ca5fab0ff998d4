"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and what their object files may not hold.

There is no ThreadSanitizer lane: gcc's libgomp is not built for it, so that every parallel loop looks like a race. What
threads share is covered by equal bits for every number of them, in test_native_threads.py.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++").split()
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

pytestmark = [
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no compiler {CXX[0]!r}"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the C++ sources are not here"),
]


def flags_of_tiers():
    """The flags of each translation unit, from setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TIERS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no TIERS")


TIERS = flags_of_tiers()


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def compiled(source, folder, *flags):
    target = folder / f"{source.stem}.o"
    own = TIERS.get(source.stem, [])  # includes of one tier must not be compiled with another's flags
    run(*CXX, "-std=c++17", *flags, *own, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target)
    return target


def sources():
    files = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    return [path for path in files if X86_64 or path.stem not in TIERS]


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    flags = ["-O1", "-g", "-fopenmp", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        (tmp_path / "empty.cpp").write_text("int main() {}")
        run(*CXX, *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty")
        run(tmp_path / "empty")
    except AssertionError as error:
        pytest.skip(f"no sanitizers here: {error}")
    with ThreadPoolExecutor(2) as pool:
        files = [*sources(), Path(__file__).parent / "cpp/check_kernels.cpp"]
        objects = list(pool.map(lambda source: compiled(source, tmp_path, *flags), files))
    program = tmp_path / "check_kernels"
    run(*CXX, *flags, *objects, "-o", program)
    print(run(program, env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=900))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.skipif(not X86_64, reason="one tier only")
@pytest.mark.parametrize("optimisation", ("-O3", "-O1"))
def test_tiers_share_no_code_and_run_none_when_loaded(tmp_path, optimisation):
    for name in ("tier_scalar", *TIERS):
        made = compiled(ROOT / f"csrc/cpu/{name}.cpp", tmp_path, optimisation, "-fPIC", "-fopenmp")
        symbols = [line.split()[-2:] for line in run("nm", made).splitlines()]
        # The linker keeps one copy of a weak symbol: with AVX-512 in it, on every machine.
        assert [name for kind, name in symbols if kind in "WwVvu"] == []
        # Initialisers run on loading, whatever the machine.
        assert [name for _, name in symbols if name.startswith("_GLOBAL__sub_I")] == []
        assert ".init_array" not in run("objdump", "-h", made) if shutil.which("objdump") else True
        tier = name.removeprefix("tier_")
        defined = {name for kind, name in symbols if kind in "DRBTG"}
        assert {"float", "double"} <= {
            name.rsplit("_", 1)[-1].rstrip("E") for name in defined if f"{tier}_kernels" in name
        }
        assert len(defined) == 2, defined  # the two tables, and nothing else that another file could call
