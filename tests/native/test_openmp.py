"""The native kernels run on torch's OpenMP runtime: a second one in the process would have threads of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from sphere_kernels import hyperspherical_energy
hyperspherical_energy(torch.eye(64), impl="native")
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(*(path for path in libraries if "libgomp" in path or "libomp" in path or "libiomp" in path), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the native kernels run on one thread, without OpenMP")
def test_one_openmp_runtime_is_loaded():
    done = subprocess.run([sys.executable, "-c", PROGRAM], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
