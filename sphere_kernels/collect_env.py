"""Environment report for issues: ``python -m sphere_kernels.collect_env [--json]``.

Only the standard library is imported at the top and every probe is guarded, so a broken installation still reports.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "pybind11", "scipy")
Section = dict[str, Any]


def collect() -> dict[str, Section]:
    """All sections of the report; a probe that fails says why in its place."""
    probes: dict[str, Callable[[], Section]] = {
        "versions": _versions,
        "machine": _machine,
        "torch": _torch,
        "devices": _devices,
        "native": _native,
        "cuda kernels": _cuda,
        "implementations": _implementations,
        "environment": _environment,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def report(sections: dict[str, Section]) -> str:
    """The sections as aligned text."""
    lines = []
    for name, section in sections.items():
        width = max((len(key) for key in section), default=0)
        lines += [f"{name}:", *(f"  {key:<{width}}  {value}" for key, value in section.items()), ""]
    return "\n".join(lines).rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m sphere_kernels.collect_env", description="Environment report.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    sections = collect()
    print(json.dumps(sections, indent=2, default=str) if options.json else report(sections))


def _guarded(probe: Callable[[], Section]) -> Section:
    try:
        return probe()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _versions() -> Section:
    return {"python": platform.python_version(), "sphere-kernels": _own_version()} | {
        name: _installed(name) or "not installed" for name in PACKAGES
    }


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    try:
        return str(importlib.import_module("sphere_kernels").__version__)
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"


def _machine() -> Section:
    return {
        "os": platform.platform(),
        "architecture": platform.machine(),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "memory": _memory(),
        "compiler of python": platform.python_compiler(),
        "executable": sys.executable,
    }


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _first_match(path: str, pattern: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.search(pattern, file.read())
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _torch() -> Section:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "not in this build",
        "rocm": torch.version.hip or "not in this build",
    }


def _devices() -> Section:
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "none available"}
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        f"cuda:{index}": f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB"
        for index, p in enumerate(found)
    }


def _native() -> Section:
    native = importlib.import_module("sphere_kernels._backends.native")
    if native.cpu is None:
        return {"sphere_kernels._cpu": native.failure}
    try:
        runs = native.instruction_set()
    except ValueError as error:
        runs = str(error)
    tiers = f"{runs} (usable here: {', '.join(native.USABLE)}; built: {', '.join(native.BUILT)})"
    return {"sphere_kernels._cpu": native.cpu.__file__, "instruction set": tiers} | dict(native.cpu.cpu_features())


def _cuda() -> Section:
    cuda = importlib.import_module("sphere_kernels._backends.cuda")
    if cuda.cuda is None:
        return {"sphere_kernels._cuda": cuda.failure}
    toolkit = cuda.cuda.toolkit()
    return {
        "sphere_kernels._cuda": cuda.cuda.__file__,
        "toolkit": f"{toolkit // 1000}.{toolkit % 1000 // 10}",
        "built for": ", ".join(f"sm_{arch}" for arch in cuda.cuda.architectures()),
        "devices": cuda.cuda.device_count(),
    }


def _implementations() -> Section:
    import torch

    from sphere_kernels import dispatch, env

    impl = env.kernels_impl()
    return {op: _selected(dispatch, op, impl, torch.float32) for op in dispatch.operations()}


def _selected(dispatch: Any, op: str, impl: str, dtype: Any) -> str:
    try:
        return str(dispatch.select(op, impl, "cpu", dtype, (1024, 1024)))
    except ValueError as error:
        return str(error)


def _environment() -> Section:
    from sphere_kernels import env

    return {row["name"]: row["value"] or "(empty)" for row in env.table()}


if __name__ == "__main__":
    main()
