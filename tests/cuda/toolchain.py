"""Compiles the CUDA kernels for the CPU, see cuda_cpu.h."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
CHECKS = HERE / "cpp/check_kernels.cpp"
BINDING = CSRC / "bindings/cuda_module.cpp"
CXX = os.environ.get("CXX", "g++").split()
FLAGS = ["-std=c++17", "-DCUDA_CPU_SHIM", "-pthread", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{HERE}"]
FLAGS += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if sys.platform != "linux":
        return "cuda_cpu.h needs Linux"
    if shutil.which(CXX[0]) is None:
        return f"no compiler {CXX[0]!r}"
    return None if KERNELS else "the kernels' sources are not here"


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command's end, whatever it is."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def must(*command: Any, **options: Any) -> str:
    """What a command prints; it must end well."""
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout


def compiled(source: Path, folder: Path, *flags: str, csrc: Path = CSRC) -> Path:
    """The object file of one source; ``csrc`` is where its headers are."""
    target = folder / f"{source.stem}.o"
    must(*CXX, *FLAGS, *flags, f"-I{csrc}", "-x", "c++", "-c", source, "-o", target)
    return target


def objects(sources: list[Path], folder: Path, *flags: str, csrc: Path = CSRC) -> dict[str, Path]:
    """Their object files by the sources' stems, made two at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compiled(source, folder, *flags, csrc=csrc), sources)
        return {target.stem: target for target in made}


def linked(parts: list[Path], target: Path, *flags: str) -> Path:
    """A program or, with -shared, a library."""
    must(*CXX, "-pthread", *flags, *parts, "-o", target)
    return target


def precompiled(folder: Path, *flags: str) -> tuple[str, ...]:
    """Flags, and those that spare compilations with them to read cuda_cpu.h."""
    must(*CXX, *FLAGS, *flags, "-w", "-x", "c++-header", HERE / "cuda_cpu.h", "-o", folder / "cuda_cpu.h.gch")
    return (*flags, "-include", str(folder / "cuda_cpu.h"))


def twin(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of the kernels' sources, one of which says something else in one place."""
    shutil.copytree(CSRC, folder / "csrc")
    path = folder / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(before) == 1, f"{file} has {text.count(before)} times {before!r}"
    path.write_text(text.replace(before, after))
    return folder / "csrc"
