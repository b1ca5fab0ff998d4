"""Finds a CUDA toolkit and compiles the kernels with it, for setup.py; from the project's root."""

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

KEPT = Path("build/cuda")  # objects, and what the assembler said of them


class NoCuda(Exception):
    """Why there is no CUDA module."""


def find_nvcc():
    """The CUDA compiler: named, on the path, of a toolkit, or of pip's packages."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    places += [f"{os.environ['CUDA_HOME']}/bin/nvcc"] if os.environ.get("CUDA_HOME") else []
    places += [f"{folder}/nvidia/cu13/bin/nvcc" for folder in sys.path]
    return next((place for place in places if place and shutil.which(place)), None)


def find_cudart(nvcc):
    """The static runtime library of the compiler's toolkit."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = Path(match[1].strip() if (match := re.search(r"^#\$ TOP=(.*)$", said, re.M)) else "")
    folders = [folder for pattern in ("lib64", "lib", "targets/*/lib") for folder in sorted(top.glob(pattern))]
    found = [folder / "libcudart_static.a" for folder in folders if (folder / "libcudart_static.a").exists()]
    if not match or not found or not list(top.glob("**/include/cuda_runtime.h")):
        raise NoCuda(f"the toolkit of {nvcc} lacks cuda_runtime.h or libcudart_static.a (pip: cuda-toolkit[cudart])")
    return str(found[0])


def said_by(*command):
    """What a command prints; raises NoCuda where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        why = re.search(r"^.*(error|fatal).*$", said, re.M)
        raise NoCuda(f"{' '.join(command)} failed: {why[0] if why else said[-300:]}")
    return said


@functools.cache
def architectures(nvcc):
    """What to compile for: what SPHERE_KERNELS_CUDA_ARCHS lists, or of ours what this compiler knows."""
    known = said_by(nvcc, "--list-gpu-arch").split()
    asked = (os.environ.get("SPHERE_KERNELS_CUDA_ARCHS") or "").split(";")
    return asked if asked != [""] else [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]


def compiled(nvcc, source):
    """The object of one source, from an earlier build where nothing has changed, and the assembler's figures."""
    target, log = (KEPT / (Path(source).stem + suffix) for suffix in (".o", ".ptxas.txt"))
    archs = architectures(nvcc)
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    command = [nvcc, *flags, *code, "-c", source, "-o", str(target)]
    head = " ".join(command) + "\n" + said_by(nvcc, "--version")
    newest = max(os.path.getmtime(path) for path in glob("csrc/cuda/*") + glob("csrc/common/*"))
    if target.exists() and log.exists() and target.stat().st_mtime > newest and log.read_text().startswith(head):
        return str(target), log.read_text()
    log.unlink(missing_ok=True)  # without one, what an interrupted compiler leaves is no object
    log.write_text(head + said_by(*command))
    return str(target), log.read_text()


def objects(nvcc):
    """Objects of the kernels and the runtime's library."""
    cudart, began = find_cudart(nvcc), time.monotonic()
    KEPT.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda source: compiled(nvcc, source), sorted(glob("csrc/cuda/*.cu"))))
    said = "".join(log for _, log in made)
    (KEPT / "ptxas.txt").write_text(said)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))
    print(
        f"CUDA: {len(registers)} kernels for {', '.join(architectures(nvcc))} in {time.monotonic() - began:.0f} s, "
        f"at most {max(registers)} registers, {spilled} bytes spilled; see {KEPT}/ptxas.txt"
    )
    return [*(target for target, _ in made), cudart]
