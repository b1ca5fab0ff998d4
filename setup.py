"""Builds the compiled modules; everything else about the distribution is in pyproject.toml.

Native code sees no torch header, so torch is not needed here. The CUDA module is built where a toolkit is found;
SPHERE_KERNELS_CUDA=1 demands it, 0 leaves it out, and SPHERE_KERNELS_CUDA_ARCHS lists its architectures.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NO_COMPILER = """
sphere-kernels builds a small C++17 module, and the compiler {compiler!r} was not found.
Install one (Debian or Ubuntu: apt-get install g++; macOS: xcode-select --install), or name yours: CXX=/path/to/c++
"""

X86_64 = platform.machine().lower() in ("x86_64", "amd64")

# One translation unit per instruction set, with flags of its own; which of them runs is decided at run time.
# No -march=native: a wheel must run on any machine of its architecture. No fast-math: NaN and infinity mean something.
TIERS = {
    "tier_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "tier_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Linux only: there torch brings the same OpenMP runtime. Without it the kernels run on one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

CUDA = os.environ.get("SPHERE_KERNELS_CUDA") or "auto"
ARCHS = (os.environ.get("SPHERE_KERNELS_CUDA_ARCHS") or "80;90;100").split(";")
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


def compiled(nvcc, source):
    """The object of one source, from an earlier build where nothing has changed, and the assembler's figures."""
    target, log = (KEPT / (Path(source).stem + suffix) for suffix in (".o", ".ptxas.txt"))
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    code += [f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"]
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    command = [nvcc, *flags, *code, "-c", source, "-o", str(target)]
    head = " ".join(command) + "\n"
    newest = max(os.path.getmtime(path) for path in [*glob("csrc/cuda/*"), "csrc/cpu/matrix.h", "setup.py"])
    if target.exists() and log.exists() and target.stat().st_mtime > newest and log.read_text().startswith(head):
        return str(target), log.read_text()
    target.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    log.write_text(head + done.stdout + done.stderr)
    if done.returncode:
        why = re.search(r"^.*(error|fatal).*$", done.stdout + done.stderr, re.M)
        raise NoCuda(f"{nvcc} failed on {source}: {why[0] if why else done.returncode}; see {log}")
    return str(target), log.read_text()


def cuda_objects(nvcc):
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
        f"CUDA: {len(registers)} kernels for sm_{', sm_'.join(ARCHS)} in {time.monotonic() - began:.0f} s, at most "
        f"{max(registers)} registers, {spilled} bytes spilled; see {KEPT}/ptxas.txt"
    )
    return [*(target for target, _ in made), cudart]


class BuildExt(build_ext):
    def build_extensions(self):
        # MSVC finds its compiler by itself and has no such attribute.
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and shutil.which(compiler[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=compiler[0]))
        try:
            if cuda in self.extensions:
                cuda.depends = cuda.extra_objects = cuda_objects(NVCC)
        except NoCuda as error:
            if CUDA == "1":
                raise SystemExit(f"SPHERE_KERNELS_CUDA=1, but {error}") from None
            print(f"warning: no CUDA module: {error}", file=sys.stderr)
            self.extensions.remove(cuda)
        compile_one = self.compiler._compile

        def with_tier_flags(target, source, suffix, arguments, extra, preprocessor):
            compile_one(target, source, suffix, arguments, extra + TIERS.get(Path(source).stem, []), preprocessor)

        self.compiler._compile = with_tier_flags
        super().build_extensions()


cpu = Pybind11Extension(
    "sphere_kernels._cpu",
    sources=[
        *(path for path in sorted(glob("csrc/cpu/*.cpp")) if X86_64 or Path(path).stem not in TIERS),
        "csrc/bindings/cpu_module.cpp",
    ],
    depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", *OPENMP],
    extra_link_args=OPENMP,
)
cuda = Pybind11Extension(
    "sphere_kernels._cuda",
    sources=["csrc/bindings/cuda_module.cpp"],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    libraries=["dl", "rt", "pthread"],
    extra_link_args=["-Wl,-s"],
)
NVCC = find_nvcc() if CUDA != "0" and sys.platform == "linux" else None
if CUDA == "1" and NVCC is None:
    raise SystemExit("SPHERE_KERNELS_CUDA=1, but no nvcc was found: name it by CUDACXX, or put it on the PATH (Linux)")

setup(ext_modules=[cpu, cuda] if NVCC else [cpu], cmdclass={"build_ext": BuildExt})
