"""Builds the compiled modules, and the parts of the metadata that know where the repository is; pyproject.toml says the
rest.

Native code sees no torch header, so torch is not needed here. The CUDA module is built where a toolkit is found;
SPHERE_KERNELS_CUDA=1 demands it, 0 leaves it out, and SPHERE_KERNELS_CUDA_ARCHS lists its architectures.
"""

import os
import platform
import re
import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

sys.path.insert(0, "tools")
import cuda_toolkit  # noqa: E402

# The repository's address, and the only place that has it. Until there is one, a reserved name stands here.
REPOSITORY = "https://example.org/sphere-kernels"
URLS = {
    "Repository": REPOSITORY,
    "Documentation": f"{REPOSITORY}/tree/HEAD/docs",
    "Changelog": f"{REPOSITORY}/blob/HEAD/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
}

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
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"SPHERE_KERNELS_CUDA must be auto, 0 or 1, got {CUDA!r}")
NVCC = cuda_toolkit.find_nvcc() if CUDA != "0" and sys.platform == "linux" else None
if CUDA == "1" and NVCC is None:
    raise SystemExit("SPHERE_KERNELS_CUDA=1, but no nvcc was found: name it by CUDACXX, or put it on the PATH (Linux)")


def long_description() -> str:
    """README.md for a package index, which has no files beside it: relative links get the address of the repository."""
    code = r"^```.*?^```|`[^`\n]+`"
    link = r'(?P<before>\]\(|^\[[^\]\n]+\]: *|(?:href|src|srcset)=")(?!https?:|mailto:)(?P<target>[^\s)"]+)'

    def absolute(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None:  # code
            return found[0]
        if not target.startswith("#"):
            target = f"/{'raw' if target.endswith(('.svg', '.png', '.jpg')) else 'blob'}/HEAD/{target}"
        return found["before"] + REPOSITORY + target

    readme = Path("README.md").read_text(encoding="utf-8")
    return re.sub(f"{code}|{link}", absolute, readme, flags=re.MULTILINE | re.DOTALL)


class BuildExt(build_ext):
    def run(self):
        super().run()
        if self.inplace and cuda not in self.extensions:  # an earlier one would still be imported
            for module in glob("sphere_kernels/_cuda*.so"):
                os.remove(module)

    def build_extensions(self):
        # MSVC finds its compiler by itself and has no such attribute.
        compiler = getattr(self.compiler, "compiler_cxx", None)
        if compiler and shutil.which(compiler[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=compiler[0]))
        try:
            if cuda in self.extensions:
                cuda.extra_objects = cuda_toolkit.objects(NVCC)
                cuda.depends += cuda.extra_objects
        except cuda_toolkit.NoCuda as error:
            if CUDA == "1":
                raise SystemExit(f"SPHERE_KERNELS_CUDA=1, but {error}") from None
            print(f"warning: no CUDA module: {error}", file=sys.stderr)
            self.extensions.remove(cuda)
        compile_one = self.compiler._compile

        def with_tier_flags(target, source, suffix, arguments, extra, preprocessor):
            compile_one(target, source, suffix, arguments, extra + TIERS.get(Path(source).stem, []), preprocessor)

        self.compiler._compile = with_tier_flags
        super().build_extensions()


HEADERS = glob("csrc/common/*.h") + glob("csrc/bindings/*.h")
cpu = Pybind11Extension(
    "sphere_kernels._cpu",
    sources=[
        *(path for path in sorted(glob("csrc/cpu/*.cpp")) if X86_64 or Path(path).stem not in TIERS),
        "csrc/bindings/cpu_module.cpp",
    ],
    depends=sorted([*HEADERS, *glob("csrc/cpu/*.h"), *glob("csrc/cpu/*.inl")]),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", *OPENMP],
    extra_link_args=OPENMP,
)
cuda = Pybind11Extension(
    "sphere_kernels._cuda",
    sources=["csrc/bindings/cuda_module.cpp"],
    depends=[*HEADERS, "csrc/cuda/launch.h"],
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
    libraries=["dl", "rt", "pthread"],
    extra_link_args=["-Wl,-s"],
)

setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls=URLS,
    ext_modules=[cpu, cuda] if NVCC else [cpu],
    cmdclass={"build_ext": BuildExt},
)
