"""The CUDA lanes: the kernels run on the CPU, ``emulated/`` in a process of its own; nvcc only compiles them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "kernels"), str(Path(__file__).parent)]  # oracle, cases; toolchain

import toolchain  # noqa: E402

EMULATED = "CUDA_CPU_MODULE" in os.environ  # see emulated_cuda.py
collect_ignore = ["emulated"] if not EMULATED else [path.name for path in Path(__file__).parent.glob("test_*.py")]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Object files, by name: of the kernels, of what checks them, of the module's binding."""
    if toolchain.missing():
        pytest.skip(toolchain.missing())
    sources = [toolchain.BINDING, *toolchain.KERNELS, toolchain.CHECKS]
    return toolchain.objects(sources, tmp_path_factory.mktemp("kernels"), "-Og")
