"""The ahead-of-time lane: every kernel with every shipped configuration, compiled for GPUs that are not here.

It writes benchmarks/results/triton_aot.json: registers, shared memory, spills, matrix instructions. No times: a
compiler knows none.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import aot  # noqa: E402
import record  # noqa: E402
import triton  # noqa: E402

from sphere_kernels._backends.triton import configs  # noqa: E402

TABLE = Path(__file__).parents[2] / "benchmarks/results/triton_aot.json"
pytestmark = pytest.mark.slow
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # sm_80 stands for sm_86 too
# Products on the plain units: fp32 as such on NVIDIA, and fp64 where the compiler knows no instruction for it.
NO_MATRIX = {(arch, "tf32x3 or ieee") for arch in ("sm_80", "sm_90", "sm_100")} | {
    ("sm_80", "ieee"),
    ("sm_90", "ieee"),
    ("sm_100", "ieee"),
    ("sm_100", "double"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The figures of every launch, by architecture."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))  # nothing left by an earlier version
        jobs = [(launch, arch) for arch in aot.TARGETS for launch in record.launches(patch, arch)]
        # Not forked: torch's threads are running.
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(aot.compiled, *zip(*jobs, strict=True)))
    made = [{"arch": arch} | described(launch) | figures for (launch, arch), figures in zip(jobs, found, strict=True)]
    TABLE.write_text(json.dumps({"triton": triton.__version__, "rows": made}, indent=1) + "\n")
    return made


def described(launch):
    constants = dict(launch.constants)
    types = dict(launch.signature)
    names = (
        "S",
        "ANGULAR",
        "HALF_SPACE",
        "FAST",
        "NORMALIZE",
        "SUBTRACT",
        "SCALE",
        "ADDEND",
        "ACCUMULATE",
        "FROM_GRAM",
    )
    variant = {name.lower(): constants[name] for name in names if constants.get(name)}
    return {
        "kernel": launch.kernel.split(":")[1],
        "operands": operands(launch),
        "reads": next(kind[1:] for kind in types.values() if kind.startswith("*")),
        "block": constants.get("BM", constants.get("BR")),
        "depth": constants.get("BK"),
        "warps": launch.warps,
        "stages": launch.stages,
        "most_registers": launch.most_registers,
        "variant": variant,
    }


def operands(launch):
    """The column of the table of configurations that a product belongs to; None for other kernels."""
    constants, types = dict(launch.constants), dict(launch.signature)
    if "PRECISION" not in constants:
        return None
    if str(constants["WIDE"]) == "fp64":
        return "double"
    first, second = types.get("p_packed") or types.get("p_a") or types["p_first"], types.get("p_b")
    if launch.kernel.endswith("pair_slopes_kernel") and not constants["FAST"] and constants["PRECISION"] == "ieee":
        return "half" if first in ("*bf16", "*fp16") else "tf32x3 or ieee"
    half = first in ("*bf16", "*fp16") and constants.get("AS_IS", True) and second in (None, first)
    return "half" if half else constants["PRECISION"]


def broken(rows, wrong):
    return [{key: row[key] for key in row if key != "matrix"} for row in rows if wrong(row)]


def test_everything_compiles(rows):
    assert broken(rows, lambda row: "failed" in row) == []
    assert {row["arch"] for row in rows} == set(configs.TABLE)


def test_nothing_is_spilled(rows):
    assert broken(rows, lambda row: row["spills"]) == []


def test_registers_and_shared_memory_fit(rows):
    assert broken(rows, lambda row: row["registers"] > REGISTERS[row["arch"]]) == []
    assert broken(rows, lambda row: row["shared"] > SHARED[row["arch"]]) == []


def test_products_are_matrix_instructions(rows):
    products = [row for row in rows if row["operands"]]
    assert broken(products, lambda row: not row["matrix"] and (row["arch"], row["operands"]) not in NO_MATRIX) == []
    for row in products:
        if row["arch"] == "sm_90" and row["operands"] != "ieee" and row["block"] >= 64:
            assert "HGMMA" in row["matrix"], row
        if row["arch"] == "sm_100" and row["operands"] in ("half", "tf32", "tf32x3") and row["block"] >= 64:
            assert any(name.startswith("UTC") for name in row["matrix"]), row


def test_rows_are_read_in_vectors(rows):
    assert broken([row for row in rows if row["operands"]], lambda row: not row["vector_loads"]) == []


def test_offsets_are_64_bits_wide_before_they_are_multiplied(rows):
    assert broken(rows, lambda row: row["narrow_offsets"]) == []


def test_every_shipped_configuration_was_compiled(rows):
    seen = {
        (r["arch"], r["operands"], r["block"], r["depth"], r["warps"], r["stages"], r["most_registers"])
        for r in rows
        if r["operands"]
    }
    for arch, table in configs.TABLE.items():
        for (kind, column), config in table.items():
            if column in record.PRECISIONS[arch] or column in ("half", "double"):
                if (kind, column) == ("update", "half"):
                    continue  # a Gram matrix is fp32 or fp64
                if kind == "general slopes" and column in ("tf32x3", "ieee"):
                    column = "tf32x3 or ieee"  # multiplied alike, see Plan.precision
                assert (arch, column, *config) in seen, (arch, kind, column, config)


def test_a_narrow_offset_is_noticed():
    text = """
    %3 = arith.muli %1, %2 : i32 loc(#loc1)
    %4 = tt.splat %3 : i32 -> tensor<16xi32> loc(#loc1)
    %5 = tt.addptr %0, %4 : tensor<16x!tt.ptr<f32>>, tensor<16xi32> loc(#loc1)
    """
    assert aot.narrow_offsets(text) == 1
    assert aot.narrow_offsets(text.replace("i32", "i64")) == 0
