"""A pytest plugin: the CUDA module is the one of the kernels on the CPU, so that ``impl="cuda"`` takes CPU tensors."""

import importlib.util
import os
import sys

NAME = "sphere_kernels._cuda"
spec = importlib.util.spec_from_file_location(NAME, os.environ["CUDA_CPU_MODULE"])
assert spec and spec.loader and "sphere_kernels" not in sys.modules
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])

from sphere_kernels import dispatch  # noqa: E402

for op in ("gram", "principal_directions"):  # which tests begin with and the CUDA kernels do not compute
    known = dispatch.operation(op).implementations
    known["cuda"] = known["native"]
