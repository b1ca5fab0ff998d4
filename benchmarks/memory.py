"""Extra memory of one call: peak resident size less the size before the call, in a separate process. Linux only."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any


def peak(module: str, case: str, way: str, shape: tuple[int, ...]) -> float:
    """MB that a way's call needs besides the arguments; a call on a tiny input loads all libraries first."""
    return _processes().apply(_peak, (module, case, way, shape))


@cache
def _processes() -> Pool:
    """A pool that runs each task in a new process, forked from a server that has only imported torch."""
    # With a fixed threshold, malloc returns large freed blocks to the system, and a new allocation counts again.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "sphere_kernels"])
        return context.Pool(1, maxtasksperchild=1)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak(module: str, name: str, way: str, shape: tuple[int, ...]) -> float:
    case: Any = importlib.import_module(module).CASES[name]
    found = next(w for w in case.ways(shape) if w.name == way)
    found.run(*found.arguments(case, shape if found.compiled else case.tiny))
    arguments = found.arguments(case, shape)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    found.run(*arguments)
    return (status("VmHWM") - before) * 1024 / 1e6


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
