"""What nvcc makes of the kernels, for GPUs that are not here: registers, spills, and the instructions that matter.

It writes benchmarks/results/cuda_ptxas.json. What the build left in build/cuda is used where it is not older than its
sources. Dynamic shared memory is no matter of the compiler: cuda_cpu.h refuses launches with more than 99 KiB.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toolchain

TABLE = toolchain.ROOT / "benchmarks/results/cuda_ptxas.json"
ARCHS = ("sm_80", "sm_90", "sm_100")
MATHS = ("ieee", "tf32x3", "tf32", "bf16", "fp16", "fp64")  # the order of csrc/cuda/multiply.cuh
MATRIX = {
    "tf32x3": "HMMA.1688.F32.TF32",
    "tf32": "HMMA.1688.F32.TF32",
    "bf16": "HMMA.16816.F32.BF16",
    "fp16": "HMMA.16816.F32",
}
PLAIN = {"ieee": "FFMA", "fp64": "DFMA"}
REGISTERS = {"pair_energy_kernel": 144, "gram_update_kernel": 176, "product_kernel": 240, "near_energy_kernel": 128}
OF_LARGE_TILES, OF_OTHERS = 232, 48
SHARED = 1 << 10  # bytes that are not dynamic
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build():
    """The objects of nvcc by the installation's own ways, and what the assembler said of each."""
    if toolchain.missing():
        pytest.skip(toolchain.missing())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toolchain.ROOT)
        patch.syspath_prepend(toolchain.ROOT / "tools")
        patch.delenv("SPHERE_KERNELS_CUDA_ARCHS", raising=False)
        import cuda_toolkit

        nvcc = cuda_toolkit.find_nvcc()
        if not nvcc:
            assert os.environ.get("SPHERE_KERNELS_CUDA") != "1", "SPHERE_KERNELS_CUDA=1, but no nvcc was found"
            pytest.skip("no CUDA toolkit: nvcc was not found")
        cuda_toolkit.KEPT.mkdir(parents=True, exist_ok=True)
        sources = [f"csrc/cuda/{source.name}" for source in toolchain.KERNELS]
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda source: cuda_toolkit.compiled(nvcc, source), sources))
        return nvcc, [Path(target).resolve() for target, _ in made], "".join(log for _, log in made)


@pytest.fixture(scope="module")
def cuobjdump():
    """NVIDIA's disassembler, from triton where there is one."""
    found = importlib.util.find_spec("triton")
    own = found and Path(found.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    tool = str(own) if own and own.exists() else shutil.which("cuobjdump")
    return tool or pytest.skip("no cuobjdump: neither triton nor a toolkit has one")


@pytest.fixture(scope="module")
def rows(build, cuobjdump):
    """Figures of every kernel for every architecture."""
    nvcc, objects, said = build
    code = machine_code(cuobjdump, objects)
    made = []
    for name, arch, text in re.findall(r"entry function '(.*?)' for '(\w+)'\n(.*?Used [^\n]*)", demangled(said), re.S):
        spilled = [int(count) for count in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)]
        shared = re.search(r"(\d+) bytes smem", text)
        figures = {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "spilled": sum(spilled),
            "shared": int(shared[1]) if shared else 0,
        }
        made.append({"arch": arch} | described(name) | figures | instructions(code[arch, described(name)["name"]]))
    made.sort(key=lambda row: (row["name"], ARCHS.index(row["arch"])))
    release = re.search(r"release [\d.]+, (\S+)", toolchain.must(nvcc, "--version"))[1]
    TABLE.write_text(json.dumps({"nvcc": release, "rows": made}, indent=1) + "\n")
    return made


def demangled(text: str) -> str:
    return toolchain.must("c++filt", "-p", input=text)


def described(name: str) -> dict[str, object]:
    """Of a kernel by its name in C++: which it is, how it multiplies, the side of its tiles."""
    kernel, arguments = re.search(r"(\w+_kernel)(?:<(.*)>)?", name).groups()
    parts = re.sub(r"\(sphere::cuda::Math\)(\d)", lambda match: MATHS[int(match[1])], arguments or "").split(", ")
    known = dict(zip(("math", "side", "fast"), parts, strict=False)) if parts[0] in MATHS else {}
    return {
        "name": f"{kernel} {' '.join(parts)}".strip(),
        "kernel": kernel,
        "math": known.get("math"),
        "side": int(known.get("side", 0)) or None,
    }


def machine_code(tool: str, objects: list[Path]) -> dict[tuple[str, str], str]:
    """The instructions of every kernel, by architecture and name."""
    found = {}
    for target in objects:
        for part in demangled(toolchain.must(tool, "-sass", target)).split("\narch = ")[1:]:
            arch = part.split("\n")[0].strip()
            for function in part.split("Function : ")[1:]:
                found[arch, described(function.split("\n")[0])["name"]] = function
    return found


def instructions(code: str) -> dict[str, object]:
    seen = collections.Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.M))
    assert seen, code[:1000]

    def count(pattern: str) -> int:
        return sum(number for name, number in seen.items() if re.fullmatch(pattern, name))

    return {
        "matrix": {name: number for name, number in sorted(seen.items()) if re.match("HMMA|DMMA", name)},
        "FFMA": count(r"FFMA.*"),
        "DFMA": count(r"DFMA.*"),
        "copies_of_16_bytes": count(r"LDGSTS\.E\.BYPASS\.128.*"),
        "shared_loads_of_16_bytes": count(r"LDS\.128.*"),
        "local": count(r"(LDL|STL).*"),
        "atomics": count(r"(ATOM|RED|ATOMG|ATOMS|REDG|REDS)\b.*"),
    }


def broken(rows, wrong):
    return [f"{row['name']} {row['arch']}: {row}" for row in rows if wrong(row)]


def test_every_kernel_for_every_architecture(rows):
    names = {row["name"] for row in rows}
    assert {(row["name"], row["arch"]) for row in rows} == {(name, arch) for name in names for arch in ARCHS}
    assert {row["math"] for row in rows if row["kernel"] == "pair_energy_kernel"} == set(MATHS)


def test_nothing_is_spilled(rows):
    assert broken(rows, lambda row: row["spilled"] or row["local"]) == []


def test_registers_and_shared_memory(rows):
    def most(row):
        return OF_LARGE_TILES if row["side"] == 128 else REGISTERS.get(row["kernel"], OF_OTHERS)

    assert broken(rows, lambda row: row["registers"] > most(row)) == []
    assert broken(rows, lambda row: row["shared"] > SHARED) == []


def test_products_are_matrix_instructions(rows):
    products = [row for row in rows if row["math"]]
    assert broken(products, lambda row: set(row["matrix"]) != {MATRIX.get(row["math"])} - {None}) == []
    assert broken(products, lambda row: row["math"] in PLAIN and row[PLAIN[row["math"]]] < 64) == []
    by_name = {(row["name"], row["arch"]): row for row in products}
    for (name, arch), row in by_name.items():
        if row["math"] == "tf32x3":  # three for one
            once = by_name[name.replace("tf32x3", "tf32"), arch]["matrix"][MATRIX["tf32"]]
            assert row["matrix"][MATRIX["tf32"]] == 3 * once, (row, once)


def test_rows_are_copied_in_the_background_16_bytes_at_a_time(rows):
    tiles = [row for row in rows if row["kernel"] in ("pair_energy_kernel", "gram_update_kernel")]
    assert broken(tiles, lambda row: not row["copies_of_16_bytes"]) == []
    assert broken(tiles, lambda row: row["math"] in PLAIN and not row["shared_loads_of_16_bytes"]) == []


def test_there_are_no_atomics(rows):
    assert broken(rows, lambda row: row["atomics"]) == []


def test_later_architectures_compile_for_themselves(build, cuobjdump):
    for target in build[1]:
        assert re.search(r"sm_100\.ptx", toolchain.must(cuobjdump, "-lptx", target)), target


def test_the_module_holds_what_was_compiled():
    """SPHERE_KERNELS_CUDA=1 demands the module, as in CI."""
    from sphere_kernels._backends import cuda

    if cuda.cuda is None:
        assert os.environ.get("SPHERE_KERNELS_CUDA") != "1", cuda.failure
        pytest.skip(cuda.failure)
    assert [f"sm_{arch}" for arch in cuda.cuda.architectures()] == list(ARCHS)
    assert not cuda.cuda.emulated and cuda.cuda.toolkit() >= 12000
