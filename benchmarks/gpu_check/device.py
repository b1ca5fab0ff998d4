"""The device under test, and the CPU with the same interface for a rehearsal."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_kernels import dispatch
from sphere_kernels._backends import gpu

ROOT = Path(__file__).resolve().parents[2]
IMPLS = ("triton", "cuda")  # the implementations under test, where they can run
NONE = "gpu-check needs a CUDA or ROCm device; torch sees none"


@dataclass(frozen=True)
class Sizes:
    """Sizes and numbers of a check.

    Attributes:
        edges: ``(n, d)`` off every block edge.
        copies: number of matrices per batch at a small one of these sizes.
        usual: ``(n, d)`` of the checks of values.
        depths: values of d for the error of products.
        shapes: ``(n, d)`` of the timings.
        small: ``(batch, n, d)``, many small matrices.
        edits: b of the updates.
        far: ``(n, d)`` with more than 2^31 elements; `wide` is an n whose n * n exceeds 2^31.
        product: side of the product that measures the machine's rate.
        copy: bytes of the copy that measures the bandwidth.
        warm_up, fewest, most: calls before the timed ones; least and greatest number of timed calls.
        seconds: approximate time for all timed calls.
    """

    edges: tuple[tuple[int, int], ...]
    copies: int
    usual: tuple[int, int]
    depths: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    small: tuple[int, int, int]
    edits: int
    far: tuple[int, int]
    wide: int
    product: int
    copy: int
    warm_up: int
    fewest: int
    most: int
    seconds: float


REAL = Sizes(
    edges=((1, 1), (2, 30), (31, 33), (33, 32), (64, 31), (65, 33), (127, 129), (129, 127), (255, 65), (257, 100)),
    copies=8,
    usual=(197, 83),
    depths=(64, 1024, 14336),
    shapes=((576, 1536), (1024, 3584), (4096, 14336), (3584, 18944)),
    small=(1024, 64, 128),
    edits=100,
    far=(264, 1 << 23),
    wide=46400,
    product=8192,
    copy=1 << 30,
    warm_up=3,
    fewest=5,
    most=50,
    seconds=1.0,
)
TINY = Sizes(
    edges=((1, 1), (9, 21)),
    copies=3,
    usual=(7, 11),
    depths=(8,),
    shapes=((6, 9),),
    small=(2, 4, 5),
    edits=2,
    far=(5, 17),
    wide=9,
    product=32,
    copy=1 << 12,
    warm_up=0,
    fewest=1,
    most=1,
    seconds=0.01,
)


class HostNumbers(TorchDispatchMode):
    """Counts the numbers read from tensors into Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class Device:
    """The current CUDA or ROCm device."""

    rehearsed = False
    sizes = REAL
    compiler = "inductor"

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch)
        cache = getattr(self._properties, "L2_cache_size", 0)
        self._flushed = torch.empty(max(4 * cache, 1 << 29), dtype=torch.uint8, device=self.torch)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def flush(self) -> None:
        """Evict the arguments of a call from L2."""
        self._flushed.zero_()

    def free(self) -> int:
        """Bytes free for allocation."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch)[0]

    def peak(self, run: Callable[[], Any]) -> float | None:
        """MB that a call allocates beyond the present memory; None if not counted."""
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.torch) - before) / 1e6

    @contextlib.contextmanager
    def without_copies_to_the_host(self) -> Iterator[None]:
        """Make every wait for the device raise within the block."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def facts(self) -> dict[str, Any]:
        found = self._properties
        return {
            "device": found.name,
            "arch": gpu.architecture(self.torch),
            "memory_gb": round(found.total_memory / 1e9, 1),
            "multiprocessors": found.multi_processor_count,
            "l2_mb": round(getattr(found, "L2_cache_size", 0) / 1e6, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }


class Rehearsal:
    """The CPU in the part of a GPU. The times are the interpreter's and mean nothing."""

    rehearsed = True
    sizes = TINY
    compiler = "eager"

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def event(self) -> Any:
        event = types.SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", time.perf_counter())
        event.elapsed_time = lambda later: 1e3 * (later.at - event.at)
        return event

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def free(self) -> int:
        return 1 << 30

    def peak(self, run: Callable[[], Any]) -> float | None:
        run()
        return None

    def without_copies_to_the_host(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        return {"device": "rehearsal on the CPU", "arch": gpu.architecture(self.torch)}


Target = Device | Rehearsal


def facts(device: Target) -> dict[str, Any]:
    """The machine, the software, and the operations that each implementation can run."""
    offered = {
        op: {impl: reason or "yes" for impl in IMPLS for reason in [_refusal(op, impl, device)]}
        for op in dispatch.operations()
    }
    return device.facts() | {
        "rehearsed": device.rehearsed,
        "torch": str(torch.__version__),
        "triton": _installed("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda_module": cuda_module(),
        "offered": offered,
        "commit": commit(),
    }


def cuda_module() -> str:
    """State of the compiled CUDA kernels: present, or the reason why not."""
    try:
        module = importlib.import_module("sphere_kernels._cuda")
    except ImportError as error:
        return f"not built ({error})"
    return "emulated on the CPU" if getattr(module, "emulated", False) else "built"


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    return _said(command)


def _refusal(op: str, impl: str, device: Target) -> str | None:
    return dispatch.refusal(op, impl, device.torch.type, torch.float32, (1024, 1024))


def _driver() -> str | None:
    if torch.version.hip:
        try:
            return Path("/sys/module/amdgpu/version").read_text().strip()
        except OSError:
            return None
    said = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return said.splitlines()[0] if said else None


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _installed(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
