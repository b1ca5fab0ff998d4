"""Shared by all benchmarks: pinned threads, the machine's own rates beside each figure, and the stored fields."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def pytest_benchmark_update_machine_info(config, machine_info):
    """Store the kind of machine in the rows, not the identity."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {key: machine_info.get("cpu", {}).get(key) for key in ("brand_raw", "count", "arch")}


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in ("project", "branch"):
        commit_info.pop(key, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Store only statistics of the rounds, and no settings: each row has its own."""
    for row in output_json["benchmarks"]:
        for key in ("options", "params", "param", "group", "fullname"):
            row.pop(key, None)
        row["stats"] = {key: row["stats"][key] for key in ("min", "median", "max", "iqr", "rounds", "iterations")}


@pytest.fixture(autouse=True, scope="session")
def pinned_threads() -> int:
    torch.set_num_threads(THREADS)
    return THREADS


@pytest.fixture(scope="session")
def gemm_gflops(pinned_threads: int) -> float:
    """Median rate of ``torch.mm`` on 2048³ fp32 in this run, in GFLOP/s."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / _seconds(lambda: torch.mm(a, a)) / 1e9


@pytest.fixture(scope="session")
def copy_gbs(pinned_threads: int) -> float:
    """Median rate of a copy of 256 MB in this run, read and written bytes together, in GB/s."""
    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(lambda: b.copy_(a)) / 1e9


@pytest.fixture(scope="session")
def machine(gemm_gflops: float, copy_gbs: float) -> dict[str, float]:
    return {"gemm_gflops": round(gemm_gflops, 1), "copy_gbs": round(copy_gbs, 1)}


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])
