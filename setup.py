"""Builds the compiled modules; everything else about the distribution is in pyproject.toml.

Native code sees no torch header, so neither torch nor a CUDA toolkit is needed here.
"""

import shutil
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

NO_COMPILER = """
sphere-kernels builds a small C++17 module, and the compiler {compiler!r} was not found.
Install one (Debian or Ubuntu: apt-get install g++; macOS: xcode-select --install), or name yours: CXX=/path/to/c++
"""


class BuildExt(build_ext):
    def build_extensions(self):
        # MSVC finds its compiler by itself and has no such attribute.
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and shutil.which(compiler[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=compiler[0]))
        super().build_extensions()


# No -march=native: a wheel must run on any machine of its architecture. No fast-math: NaN and infinity mean something.
cpu = Pybind11Extension(
    "sphere_kernels._cpu",
    sources=sorted(glob("csrc/cpu/*.cpp")) + ["csrc/bindings/cpu_module.cpp"],
    depends=sorted(glob("csrc/cpu/*.h")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)

setup(ext_modules=[cpu], cmdclass={"build_ext": BuildExt})
