"""The CUDA kernels through Python, and what is asked of every implementation, where they run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest
import toolchain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing())),
]
LANES = {
    "blocks": ["tests/cuda/emulated"],
    "contract": [f"tests/kernels/test_{name}.py" for name in ("energy", "gram_update", "projection", "support")],
}


@pytest.fixture(scope="module")
def lanes(kernels, tmp_path_factory):
    """Each lane's process, begun at once; a test waits for its own."""
    parts = [kernels[source.stem] for source in (toolchain.BINDING, *toolchain.KERNELS)]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = toolchain.linked(parts, tmp_path_factory.mktemp("module") / f"_cuda{suffix}", "-shared")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, module, files) for name, files in LANES.items()}


def run(module, files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulated_cuda", "-W", "ignore"]
    # Bad arguments are refused before there is an implementation, and name those that other machines have.
    command += ["-k", "not test_bad_arguments_change_nothing", *files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPHERE_KERNELS_")}
    env |= {"CUDA_CPU_MODULE": str(module), "CUDA_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(toolchain.HERE), os.environ.get("PYTHONPATH", "")])
    return toolchain.run(*command, cwd=toolchain.ROOT, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("name", LANES)
def test_lane(lanes, name):
    done = lanes[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
