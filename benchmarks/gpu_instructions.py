"""Instruction counts of the compiled kernels on sm_90: ``python -m benchmarks.gpu_instructions``.

The program compiles the launches of the ahead-of-time lane (tests/triton) and the CUDA sources, and disassembles them.
It counts instructions in the loop over the inner dimension and outside → ``results/gpu_instructions.json``;
`benchmarks.gpu_model` reads this file. Needs triton, which brings the disassembler, and nvcc; no GPU.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/gpu_instructions.json"
ARCH = "sm_90"
KERNELS = ("pair_energy_kernel", "pair_slopes_kernel", "gram_kernel", "gram_update_kernel", "product_kernel")
VARIANT = ("S", "ANGULAR", "HALF_SPACE", "FAST", "NORMALIZE", "SUBTRACT", "SCALE", "ADDEND", "ACCUMULATE")

# Instructions by the pipe that bounds their rate, see `benchmarks.gpu_model.LANES`; others only take an issue slot.
PIPES = {
    "fma": r"F(ADD|MUL|FMA)|FADD2|FFMA2",
    "alu": r"FSETP|FSEL|FMNMX|FCHK|I(ADD3|SETP|MNMX|ABS|MAD|MUL)|LOP3|PLOP3|SEL|SHF|LEA|PRMT|VIADD|VIMNMX|BMSK|SGXT",
    "mufu": r"MUFU|F2F|I2F|F2I",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "matrix": r"HGMMA|HMMA|DMMA",
}


def parsed(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions without predicates, and the loops as (first, last) indices."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    jumps = ((place, re.search(r"BRA.*?(\.L_\w+)", text)) for place, text in enumerate(found))
    loops = [(labels[m[1]], place) for place, m in jumps if m and labels.get(m[1], place + 1) <= place]
    return found, loops


def counted(instructions: list[str]) -> dict[str, Any]:
    """Number of instructions by pipe, and floating-point operations of a warp's matrix instructions."""
    names = [text.split()[0] for text in instructions]
    by_pipe = collections.Counter(
        pipe for name in names for pipe, pattern in PIPES.items() if re.fullmatch(pattern, name.split(".")[0])
    )
    matrix = collections.Counter(name for name in names if re.match(PIPES["matrix"], name))
    return {"issued": len(names), **dict(sorted(by_pipe.items()))} | {
        "matrix_flops": sum(count * flops(name) for name, count in matrix.items()),
        "matrix_names": dict(sorted(matrix.items())),
    }


def flops(name: str) -> int:
    """Floating-point operations of a matrix instruction, per warp; four warps share an HGMMA."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", name)
    if shape is None:
        digits = re.search(r"\.(1688|16816|884|1684)\b", name)
        assert digits, name
        m, n, k = {"1688": (16, 8, 8), "16816": (16, 8, 16), "884": (8, 8, 4), "1684": (16, 8, 4)}[digits[1]]
    else:
        m, n, k = map(int, shape.groups())
    return 2 * m * n * k // (4 if name.startswith("HGMMA") else 1)


def split(code: str) -> dict[str, Any]:
    """Counts of four parts: the innermost loop that multiplies, the rest of a loop around it, the loop over rows, and
    the rest of the kernel.

    Triton's kernels have only the first of these loops; the loop over rows takes the reciprocal roots.
    """
    instructions, loops = parsed(code)

    def many(loop: tuple[int, int], pattern: str) -> int:
        return sum(bool(re.match(pattern, text)) for text in instructions[loop[0] : loop[1] + 1])

    main = max(loops, key=lambda loop: (many(loop, r"\w*MMA|FFMA|DFMA"), loop[0] - loop[1]))
    parts: dict[str, set[int]] = {"loop": set(range(main[0], main[1] + 1))}
    around = [loop for loop in loops if loop[0] < main[0] and loop[1] > main[1]]
    if around:
        first, last = max(around)
        parts["around"] = set(range(first, last + 1)) - parts["loop"]
    after = [loop for loop in loops if loop[0] > main[1] and many(loop, "MUFU")]
    if after:
        first, last = max(after, key=lambda loop: many(loop, "MUFU"))
        parts["rows"] = set(range(first, last + 1))
    parts["outside"] = set(range(len(instructions))).difference(*parts.values())
    return {name: counted([instructions[place] for place in sorted(places)]) for name, places in parts.items()}


def record() -> list[dict[str, Any]]:
    """Rows for every launch of Triton's multiplying kernels."""
    sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "tests/triton")]
    import aot
    import pytest
    import record as launches

    figures = aot.figures

    def with_counts(made: Any, backend: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(made.asm["cubin"])
            code = aot.run(aot.TOOLS / "nvdisasm", "-c", file)
        return {key: figures(made, backend)[key] for key in ("registers", "shared")} | split(code)

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "figures", with_counts)
        for launch in launches.launches(patch, ARCH):
            name, constants = launch.kernel.split(":")[1], dict(launch.constants)
            if name not in KERNELS:
                continue
            kinds = dict(launch.signature)
            pointer = next(kind for kind in kinds.values() if kind.startswith("*"))
            rows.append(
                {
                    "kernel": name,
                    "reads": pointer[1:],
                    "and": kinds.get("p_b", pointer)[1:],
                    "precision": constants["PRECISION"],
                    "block": constants["BM"],
                    "depth": constants["BK"],
                    "warps": launch.warps,
                    "variant": {key.lower(): constants[key] for key in VARIANT if constants.get(key)},
                }
                | aot.compiled(launch, ARCH)
            )
    return rows


# Mangled name of sphere::cuda::NAME<Math, side, fast>; Math in the order of csrc/cuda/multiply.cuh.
MANGLED = r"_ZN6sphere4cuda\d+(\w+_kernel)ILNS0_4MathE(\d)ELi(\d+)ELb([01])EEE\S*"
MATHS = ("ieee", "tf32x3", "tf32", "bf16", "fp16", "fp64")
CUDA_SOURCES = ("pair_energy", "gram_update")
SLAB_BYTES, STAGES = 128, 3  # of csrc/cuda/multiply.cuh


def record_cuda() -> list[dict[str, Any]]:
    """Rows of the CUDA kernels of tiles for s = 1; kernels of products choose types at run time and have none."""
    sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "tests/triton")]
    import aot

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in CUDA_SOURCES:
            file = Path(folder) / f"{source}.cubin"
            command = ["nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch={ARCH}", "-cubin", "-o", str(file)]
            subprocess.run([*command, str(ROOT / f"csrc/cuda/{source}.cu")], check=True)
            usage = dict(
                re.findall(r"Function (\S+):\s+REG:(\d+)", aot.run(aot.TOOLS / "cuobjdump", "-res-usage", file))
            )
            code = aot.run(aot.TOOLS / "nvdisasm", "-c", file)
            for name, text in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\t\.section|\Z)", code, re.M | re.S):
                if not (match := re.fullmatch(MANGLED, name)):
                    continue
                kernel, math, side, fast = match[1], MATHS[int(match[2])], int(match[3]), match[4] == "1"
                if not fast:
                    continue  # their fp64 per pair outweighs the products
                size = {"bf16": 2, "fp16": 2, "fp64": 8}.get(math, 4)
                threads = 2 * side if math not in ("ieee", "fp64") else 256
                row = {"kernel": f"cuda {kernel}", "precision": math, "block": side, "depth": SLAB_BYTES // size}
                row |= {"warps": threads // 32, "variant": {"fast": True}, "registers": int(usage[name])}
                row |= {"shared": STAGES * 2 * side * SLAB_BYTES, "passes": side * 32 // threads}
                rows.append(row | split(text))
    return rows


def main() -> None:
    import triton

    rows = record() + record_cuda()
    RESULT.write_text(json.dumps({"triton": triton.__version__, "arch": ARCH, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
