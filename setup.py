"""Builds the compiled modules; everything else about the distribution is in pyproject.toml.

Native code sees no torch header, so neither torch nor a CUDA toolkit is needed here.
"""

import platform
import shutil
import sys
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


class BuildExt(build_ext):
    def build_extensions(self):
        # MSVC finds its compiler by itself and has no such attribute.
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and shutil.which(compiler[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=compiler[0]))
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

setup(ext_modules=[cpu], cmdclass={"build_ext": BuildExt})
