"""The shipped configurations: one table, by architecture, kind of kernel, operands and size; no tuning at run time.

A choice by timing would differ from run to run, and with it the order of sums and so the last bits of a result.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

SMALL = 64  # matrices of at most so many rows take the small tile
MEDIUM = (
    2048  # those of at most so many no larger one than `MEDIUM_TILE`: 1024 rows are 136 tiles of it, 36 of twice it
)
MEDIUM_TILE = 64


class Config(NamedTuple):
    """Block sizes and what the compiler is told.

    Attributes:
        block: rows (and columns) of a tile.
        depth: elements of the inner dimension at a time.
        warps, stages: of Triton.
        registers: per thread, where NVIDIA's assembler would rather spill than have few threads; else its own choice.
    """

    block: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# Kinds: "energy", "gram", "update" and "slopes", tiles of symmetric products with their epilogues; "general" and
# "general slopes", those with fp64 for every pair (any distance and exponent); "product", what has no symmetry.
# Operands: "half" (bf16 and fp16), "tf32", "tf32x3", "ieee" (fp32, multiplied in one of these ways) and "double".
Table = dict[tuple[str, str], Config]
KINDS = ("energy", "gram", "update", "slopes", "general", "general slopes", "product")
OPERANDS = ("half", "tf32", "tf32x3", "ieee", "double")


def _table(stages: int, products: dict[str, Config], overrides: dict[tuple[str, str], Config]) -> Table:
    """Of one architecture: the largest tiles that leave each kernel its registers, found by compiling ahead of time."""
    made = {(kind, "double"): Config(32, 16, 4, 2) for kind in KINDS}
    made["product", "double"] = Config(32, 16, 8, 2)
    for operands in ("half", "tf32", "tf32x3", "ieee"):
        depth = 64 if operands == "half" else 32
        for kind in KINDS:
            made[kind, operands] = Config(64, depth, 8, stages)
        made["gram", operands] = made["energy", operands] = Config(64, depth, 4, stages)
        made["product", operands] = products.get(operands, Config(64, depth, 8, stages))
        made["general", operands] = Config(64, depth, 8, stages, 255)
        made["general slopes", operands] = Config(32, depth, 8, stages, 255)
    made["energy", "half"] = made["gram", "half"] = Config(128, 64, 8, stages)
    return made | overrides


HALF, TF32 = Config(128, 64, 8, 3), Config(128, 32, 8, 3)
TABLE: dict[str, Table] = {
    "sm_80": _table(
        3,
        {"half": HALF, "tf32": TF32},
        {
            ("energy", "tf32"): TF32,
            ("slopes", "tf32x3"): Config(64, 16, 8, 3),
            ("general", "tf32x3"): Config(32, 32, 4, 3, 255),
        },
    ),
    "sm_90": _table(
        3,
        {"half": HALF, "tf32": TF32, "tf32x3": TF32},
        {("energy", "tf32"): TF32, ("energy", "tf32x3"): TF32},
    ),
    "sm_100": _table(
        3,
        {"half": HALF, "tf32": TF32, "tf32x3": TF32},
        {("energy", "tf32"): TF32, ("gram", "half"): Config(64, 64, 4, 3)},
    ),
    "gfx942": _table(2, {"half": Config(128, 64, 8, 2)}, {}),
}

SMALL_TILE = Config(32, 32, 4, 2)
ROWS = Config(4, 256, 4, 1)  # rows at a time, and elements of each
NEAR = Config(16, 16, 4, 1, 255)
SUMS = Config(128, 1, 4, 1)


def table_for(arch: str) -> str:
    """The architecture of the table that stands for this one."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch.startswith("sm_9"):
        return "sm_90"
    if arch in ("sm_100", "sm_103"):
        return "sm_100"
    return "sm_80"  # also what has Blackwell's name but not its tensor memory, and the interpreter


def side(rows: int, cols: int) -> int:
    """The rows of a symmetric product with as many tiles as one of ``[rows, cols]``; at most `SMALL` where that is."""
    return min(rows, cols) if min(rows, cols) <= SMALL else isqrt(2 * rows * cols)


def find(arch: str, kind: str, operands: str, n: int) -> Config:
    """The configuration of a kernel for symmetric products of n rows, see `side`. It does not depend on the number of
    matrices, and so neither do the bits of a result."""
    shipped = TABLE[table_for(arch)][kind, operands]
    if n <= SMALL and operands != "double":
        return SMALL_TILE
    if n <= MEDIUM and shipped.block > MEDIUM_TILE:
        return shipped._replace(block=MEDIUM_TILE, warps=4)
    return shipped
