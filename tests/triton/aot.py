"""Launches recorded on the CPU, compiled ahead of time for GPUs that are not here, and what their code shows."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sphere_kernels._backends.triton.configs import Config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
MATRIX = {
    "cuda": r"\b(DMMA|HMMA|HGMMA|UTC\w*MMA)\b",
    "hip": r"\b(v_(?:s?mfmac?|wmma)_\w+)",
}
VECTOR_LOAD = {
    "cuda": r"\b(?:LDG\.E(?:\.\w+)*\.(?:64|128)|LDGSTS\.E(?:\.\w+)*\.(?:64|128)|UBLKCP|UTMALDG)\b",
    "hip": r"\b(?:global|buffer)_load_dwordx[24]",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types, the specialised values and the options of one launch."""

    kernel: str  # module:name
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    most_registers: int | None


def recorded(kernel: Any, arguments: dict[str, Any], config: Config) -> Launch:
    """What Triton's launcher would compile for these arguments: types, and which of them 16 divides."""
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, aligned = [], [], []
    for name in kernel.arg_names:
        value = arguments[name]
        if name in constexprs or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((name, POINTERS[value.dtype]))
            aligned += [name]  # torch's memory is, and so are the rows of what is packed
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [name] if value % 16 == 0 else []
    place = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Launch(place, tuple(signature), tuple(constants), tuple(aligned), *config[2:])


def compiled(launch: Launch, arch: str) -> dict[str, Any]:
    """Figures of a launch's machine code, or the compiler's complaint."""
    module, _, name = launch.kernel.partition(":")
    kernel = getattr(__import__(module, fromlist=[name]), name)
    places = list(kernel.arg_names)
    attrs = {(places.index(argument),): [["tt.divisibility", 16]] for argument in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.most_registers and TARGETS[arch].backend == "cuda":
        options["maxnreg"] = launch.most_registers
    try:
        made = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    return figures(made, TARGETS[arch].backend)


def figures(made: Any, backend: str) -> dict[str, Any]:
    """Registers, spills, shared memory, matrix instructions, vector loads."""
    if backend == "hip":
        code = made.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))

        # Spilled scalar registers go to lanes of vector registers, not to memory.
        found = {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count")}
        found["shared"] = max(number("group_segment_fixed_size"), made.metadata.shared)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "kernel.cubin")
            Path(file).write_bytes(made.asm["cubin"])
            usage = run(TOOLS / "cuobjdump", "-res-usage", file)
            code = run(TOOLS / "nvdisasm", "-c", file)
        found = {"registers": int(re.search(r"REG:(\d+)", usage).group(1)), "spills": 0}
        if re.search(r"\b(?:STL|LDL)\b", code):  # local memory: spills, or the stack
            found["spills"] = spilled(made.asm["ptx"])
        found["shared"] = made.metadata.shared
    found["narrow_offsets"] = narrow_offsets(made.asm["ttir"])
    counts = collections.Counter(re.findall(MATRIX[backend], code))
    return found | {"matrix": dict(sorted(counts.items())), "vector_loads": len(re.findall(VECTOR_LOAD[backend], code))}


def narrow_offsets(ttir: str) -> int:
    """Pointer steps of 32 bits that come out of a multiplication of 32 bits, which may have overflowed."""
    made = dict(re.findall(r"(%\S+) = (.*)", ttir))

    def product(name: str, depth: int = 0) -> bool:
        text = made.get(name, "")
        if "arith.muli" in text:
            return "i32" in text.rpartition(":")[2].replace("xi32", " i32").split("loc")[0]
        passes = ("arith.addi", "arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.trunci")
        return any(p in text for p in passes) and any(product(x, depth + 1) for x in re.findall(r"%[\w#]+", text))

    steps = re.findall(r"tt\.addptr %\S+, (%\S+)", ttir)
    return sum(product(step) for step in steps)


def spilled(ptx: str) -> int:
    """Bytes that ptxas says it spills."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    tool = TOOLS / ("ptxas-blackwell" if target.startswith("sm_1") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.ptx")
        Path(file).write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={target}", file, "-o", os.path.join(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))


def run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
