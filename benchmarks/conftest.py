"""What every benchmark shares: pinned threads, and the machine's own rates beside each figure."""

from __future__ import annotations

import os
import time
from statistics import median

import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def pytest_benchmark_update_machine_info(config, machine_info):
    """The stored rows say what kind of machine they come from, not which one."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {key: machine_info.get("cpu", {}).get(key) for key in ("brand_raw", "count", "arch")}


@pytest.fixture(autouse=True, scope="session")
def pinned_threads() -> int:
    torch.set_num_threads(THREADS)
    return THREADS


@pytest.fixture(scope="session")
def gemm_gflops(pinned_threads: int) -> float:
    """Median rate of ``torch.mm`` on 2048³ fp32, in GFLOP/s: what the machine gives in this very run."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / median(times) / 1e9
