"""The shipped configurations: one table, by architecture, kind of kernel, operands and size; no tuning at run time.

A choice by timing would differ from run to run, and with it the order of sums and so the last bits of a result.
"""

from __future__ import annotations

from typing import NamedTuple

SMALL = 64  # matrices of at most so many rows take the small tile


class Config(NamedTuple):
    """Block sizes and what the compiler is told.

    Attributes:
        block: rows (and columns) of a tile.
        depth: elements of the inner dimension at a time.
        warps, stages: of Triton.
    """

    block: int
    depth: int
    warps: int
    stages: int


# Kinds: "tile", symmetric products with their epilogue in fp32; "general", with one in fp64; "product", all others.
# Operands: "half" (bf16 and fp16), "tf32", "tf32x3", "ieee" (fp32 in one of these ways) and "double".
TABLE: dict[str, dict[tuple[str, str], Config]] = {
    "sm_80": {
        ("tile", "half"): Config(64, 64, 4, 3),
        ("tile", "tf32"): Config(64, 32, 4, 3),
        ("tile", "tf32x3"): Config(64, 32, 4, 3),
        ("tile", "ieee"): Config(64, 32, 4, 3),
        ("product", "half"): Config(64, 64, 4, 3),
        ("product", "tf32"): Config(64, 32, 4, 3),
        ("product", "tf32x3"): Config(64, 32, 4, 3),
        ("product", "ieee"): Config(64, 32, 4, 3),
        ("general", "half"): Config(64, 64, 8, 3),
        ("general", "tf32"): Config(64, 32, 8, 3),
        ("general", "tf32x3"): Config(64, 32, 8, 3),
        ("general", "ieee"): Config(64, 32, 8, 3),
        ("general", "double"): Config(32, 16, 4, 2),
        ("product", "double"): Config(32, 16, 4, 2),
        ("tile", "double"): Config(32, 16, 4, 2),
    },
}
for _arch in ("sm_90", "sm_100", "gfx942"):
    TABLE[_arch] = dict(TABLE["sm_80"])

SMALL_TILE = Config(32, 32, 4, 2)
ROWS = Config(4, 256, 4, 1)  # rows at a time, and elements of each
NEAR = Config(16, 16, 4, 1)
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


def find(arch: str, kind: str, operands: str, n: int) -> Config:
    """The configuration of a kernel for matrices of n rows."""
    config = TABLE[table_for(arch)][kind, operands]
    return SMALL_TILE if n <= SMALL and operands != "double" else config
