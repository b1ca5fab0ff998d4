"""A model of the GPU kernels' time: operations and bytes counted, over datasheet rates of the H100 SXM.

The model predicts; nothing here was measured. Instruction counts come from `benchmarks.gpu_instructions`, tiles and
their order from the launches. `benchmarks.gpu_page` makes the tables of docs/gpu.md from the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch

from benchmarks.gpu_instructions import RESULT
from sphere_kernels._backends.triton import configs, schedule

# Dense rates, from the datasheet of the H100 SXM.
MATRIX = {"tf32": 494e12, "half": 989e12, "double": 67e12}  # flop/s
PLAIN = {"ieee": 67e12, "double": 34e12}
DRAM = 3.35e12  # bytes/s
MULTIPROCESSORS = 132
# Architecture: registers, shared memory and warps of a multiprocessor, results per clock of each pipe.
REGISTERS, SHARED, WARPS = 65536, 227 << 10, 64
LANES = {"issued": 128, "fma": 128, "alu": 64, "mufu": 16, "fp64": 64}
CLOCK = MATRIX["tf32"] / (MULTIPROCESSORS * 2048)  # 2048 flop a clock then give the datasheet's rate: 1.83 GHz
# Assumptions, from no datasheet.
L2 = 5.5e12  # bytes/s to the multiprocessors
SUSTAINED = 0.8  # share of the matrix units' rate, at the power and the clocks of a long run
MMA_SYNC = 0.62  # share of that if a warp multiplies alone (HMMA): about the rate of microbenchmarks, arXiv 2402.13499
STREAMED = 0.9  # share of DRAM's rate
LAUNCH = 10e-6  # s per launch from Python
LEAST = 3e-6  # s of the smallest kernel

SHAPES = ((576, 1536), (1024, 3584), (4096, 14336), (3584, 18944))
EDITS, GROUP, BATCH = 100, 2048, (1024, 64, 128)  # GROUP: rows with slopes in memory at a time
PRECISIONS = ("tf32x3", "tf32", "ieee", "half")
SIZE = {"tf32x3": 4, "tf32": 4, "ieee": 4, "half": 2}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, given by a row of instruction counts."""

    row: dict[str, Any]

    @property
    def unroll(self) -> float:
        """Steps of the inner dimension per pass of the loop."""
        inside, outside = (self.row[part]["matrix_flops"] for part in ("loop", "outside"))
        if not inside:
            step = self.row["block"] ** 2 * self.row["depth"] / (32 * self.row["warps"])
            return self.row["loop"]["fma"] / step if self.row["loop"]["fma"] < step else 1
        return round(inside / (inside - outside)) if 0 < outside < inside else 1

    @property
    def blocks(self) -> int:
        """Number of blocks that fit on a multiprocessor."""
        threads = 32 * self.row["warps"]
        registers = ceil(self.row["registers"] / 8) * 8 * threads
        return min(REGISTERS // registers, SHARED // (self.row["shared"] + 1024), WARPS // self.row["warps"])

    @property
    def rate(self) -> float:
        """Rate of the matrix units for the kernel's type, in flop per clock and multiprocessor."""
        names = " ".join(self.row["loop"]["matrix_names"])
        kind = "tf32" if "TF32" in names else "double" if "DMMA" in names else "half"
        return MATRIX[kind] / MULTIPROCESSORS / CLOCK

    @property
    def sustained(self) -> float:
        """Expected share of the matrix units' rate."""
        return SUSTAINED * (
            MMA_SYNC if any(name.startswith("HMMA") for name in self.row["loop"]["matrix_names"]) else 1
        )

    def count(self, what: str, steps: float, once: bool = True) -> float:
        """Instructions of a kind that a warp issues in so many steps, and, if ``once``, before and after the steps."""
        row = self.row
        found = steps * (row["loop"].get(what, 0) / self.unroll + row.get("around", {}).get(what, 0))
        after = row.get("passes", 0) * row.get("rows", {}).get(what, 0) + row["outside"].get(what, 0)
        return found + after if once else found

    def cycles(self, steps: float, once: bool = True) -> dict[str, float]:
        """Clocks of each pipe for one block alone; arguments as for `count`."""
        warps = self.row["warps"]
        found = {pipe: self.count(pipe, steps, once) * warps * 32 / lanes for pipe, lanes in LANES.items()}
        flops = steps / self.unroll * self.row["loop"]["matrix_flops"]
        return found | {"matrix": flops * warps / self.rate}


@dataclass(frozen=True)
class Work:
    """One launch: ``best`` and ``expected`` seconds, the ``bound`` of the latter, bytes, and flops executed."""

    name: str
    best: float
    expected: float
    bound: str
    dram: float = 0.0
    l2: float = 0.0
    flops: float = 0.0


@cache
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"]
    return found


def kernel(name: str, precision: str, block: int, *, second: str | None = None, **variant: Any) -> Kernel:
    """The compiled kernel for operands of a precision; ``"half"`` stands for bf16."""
    reads = "bf16" if precision == "half" else "fp32"
    told = "ieee" if precision == "half" else precision
    wanted = {"kernel": name, "reads": reads, "precision": told, "block": block, "variant": variant}
    wanted |= {"and": second or reads}
    found = [row for row in rows() if all(row[key] == value for key, value in wanted.items())]
    assert found, wanted
    return Kernel(found[0])


def config(kind: str, precision: str, n: int) -> configs.Config:
    return configs.find("sm_90", kind, precision, n)


def tiled(name: str, k: Kernel, tiles: int, depth: int, l2: float, dram: float) -> Work:
    """A launch of one block per tile, each with sums over ``depth``.

    At best, every pipe of a multiprocessor overlaps every other. Expected: within a block, the matrix units and the
    other pipes take turns, since the warps wait for each other at each step; blocks on one multiprocessor overlap.
    """
    steps = ceil(depth / k.row["depth"])
    pipes = k.cycles(steps)
    most = ceil(tiles / MULTIPROCESSORS)
    best = {"compute": most * max(pipes.values()) / CLOCK, "DRAM": dram / DRAM}
    matrix, rest = pipes.pop("matrix") / k.sustained, max(pipes.values())

    def group(blocks: int) -> float:
        return max(blocks * matrix, blocks * rest, matrix + rest)

    whole, left = divmod(most, k.blocks)
    clocks = whole * group(k.blocks) + (group(left) if left else 0)
    busy = "matrix units" if matrix > rest else "other instructions"
    few = ", few blocks" if tiles < 2 * MULTIPROCESSORS * k.blocks else ""
    expected = {busy + few: clocks / CLOCK, "L2": l2 / L2, "DRAM": dram / DRAM / STREAMED, "launch": LEAST}
    bound = max(expected, key=lambda what: expected[what])
    executed = tiles * k.row["warps"] * (steps / k.unroll * k.row["loop"]["matrix_flops"])
    return Work(name, max(best.values()), expected[bound], bound, dram, l2, executed)


def streamed(name: str, dram: float) -> Work:
    """A launch that only moves memory."""
    return Work(name, dram / DRAM, max(dram / DRAM / STREAMED, LEAST), "DRAM", dram)


def met(tiles: torch.Tensor, block: int, running: int) -> int:
    """Rows read from DRAM, if blocks running at the same time share reads and L2 keeps nothing for later."""
    return sum(len(part.unique()) for part in tiles.split(running)) * block


@cache
def triangle(side: int, running: int) -> int:
    """`met` for the schedule of a triangle, in blocks."""
    return met(schedule.triangle(side, torch.device("cpu")), 1, running)


def symmetric(name: str, k: Kernel, n: int, width: int, size: int, extra: float, factors: int = 1) -> Work:
    """A launch over the triangle of tiles of an ``[n, n]`` product, with ``factors`` matrices on either side."""
    block = k.row["block"]
    side = ceil(n / block)
    tiles = side * (side + 1) // 2
    read = triangle(side, MULTIPROCESSORS * k.blocks) * block * width * size * factors
    return tiled(name, k, tiles, width, tiles * 2.0 * block * width * size, read + extra)


def packed(n: int, d: int, size: int) -> Work:
    return streamed("rows_pack", 2.0 * n * d * size)


def partial(n: int, block: int) -> float:
    """Bytes of the sums of all tiles."""
    return 8.0 * n * ceil(n / block)


def width_of(d: int) -> int:
    return ceil(d / 16) * 16


def cuda_kernel(name: str, precision: str, side: int) -> Kernel:
    wanted = f"cuda {name}", "bf16" if precision == "half" else precision, side
    return Kernel(next(row for row in rows() if (row["kernel"], row["precision"], row["block"]) == wanted))


def cuda_energy(n: int, d: int, precision: str) -> list[Work]:
    """Launches of the forward pass by the CUDA kernels."""
    side, size = 128 if n > 128 else 64, SIZE[precision]
    sums = partial(n, side)
    k = cuda_kernel("pair_energy_kernel", precision, side)
    return [
        packed(n, d, size),
        symmetric("pair_energy", k, n, width_of(d), size, sums),
        streamed("near_energy", sums),
        streamed("energy_sum", sums),
        streamed("sum", 8.0 * n),
    ]


def cuda_update(n: int, d: int, precision: str) -> list[Work]:
    side, width = 64, width_of(2 * EDITS)
    sums = partial(n, side)
    k = cuda_kernel("gram_update_kernel", precision, side)
    return [
        *(streamed("terms", 8.0 * n * EDITS) for _ in range(12)),  # torch operations in fp64
        *[packed(n, width, 4)] * 2,
        streamed("rows", 8.0 * n),
        symmetric("gram_update", k, n, width, 4, 6.0 * n * n + sums, factors=2),
        streamed("near_energy", sums),
        streamed("energy_sum", sums),
    ]


def energy(n: int, d: int, precision: str) -> list[Work]:
    c, size = config("energy", precision, n), SIZE[precision]
    k = kernel("pair_energy_kernel", precision, c.block, s=1.0, fast=True)
    sums = partial(n, c.block)
    return [
        packed(n, d, size),
        symmetric("pair_energy", k, n, width_of(d), size, sums),
        streamed("near_energy", sums),
        streamed("energy_sum", sums),
        streamed("sum", 8.0 * n),
    ]


def gradient(n: int, d: int, precision: str) -> list[Work]:
    """Launches of the forward and the backward pass."""
    c, size = config("slopes", precision, n), SIZE[precision]
    k = kernel("pair_slopes_kernel", precision, c.block, s=1.0, fast=True)
    second = "bf16" if precision == "half" else "fp32"
    multiplied = "tf32x3" if precision == "half" else precision
    found = [*energy(n, d, precision), packed(n, d, size), streamed("zeros", 4.0 * n * d)]
    groups = [min(GROUP, n - start) for start in range(0, n, GROUP)]
    for i, down in enumerate(groups):
        for j, across in enumerate(groups[i:], i):
            if i == j:
                found.append(symmetric("pair_slopes", k, down, width_of(d), size, 4.0 * down * down))
            else:
                sides = ceil(down / c.block), ceil(across / c.block)
                order = schedule.rectangle(*sides, torch.device("cpu")) + torch.tensor([0, sides[0]])
                read = met(order, c.block, MULTIPROCESSORS * k.blocks) * width_of(d) * size + 8.0 * down * across
                l2 = sides[0] * sides[1] * 2.0 * c.block * width_of(d) * size
                found.append(tiled("pair_slopes", k, sides[0] * sides[1], width_of(d), l2, read))
            for here, there in ((down, across),) if i == j else ((down, across), (across, down)):
                found.append(streamed("near_slopes", partial(here, c.block)))
                variant = {"scale": True, "accumulate": True}
                p = config("product", multiplied, configs.side(here, d))
                m = kernel("product_kernel", multiplied, p.block, second=second, **variant)
                found.append(product("slopes @ rows", m, here, d, there, (4, size), 8))
    return [*found, streamed("rows_gradient", n * d * (4.0 + 3 * size))]


def product(
    name: str, k: Kernel, down: int, across: int, depth: int, sizes: tuple[int, int], per_output: float
) -> Work:
    """``[down, depth] @ [depth, across]``, with so many bytes read and written per element of the result."""
    block = k.row["block"]
    sides = ceil(down / block), ceil(across / block)
    tiles = sides[0] * sides[1]
    l2 = tiles * block * depth * float(sum(sizes))
    dram = down * depth * sizes[0] + depth * across * sizes[1] + down * across * per_output
    return tiled(name, k, tiles, depth, l2, dram)


def gram(n: int, d: int, precision: str) -> list[Work]:
    c, size = config("gram", precision, n), SIZE[precision]
    if precision == "half":
        k = kernel("gram_kernel", precision, c.block, normalize=True)  # the plain kernel has no row; it does less
    else:
        k = kernel("gram_kernel", precision, c.block)
    found = [] if d % 16 == 0 and precision != "tf32" else [packed(n, d, size)]
    return [*found, symmetric("gram", k, n, width_of(d), size, 4.0 * n * n)]


def update(n: int, d: int, precision: str) -> list[Work]:
    c, width = config("update", precision, n), width_of(2 * EDITS)
    k = kernel("gram_update_kernel", precision, c.block, s=1.0, fast=True)
    sums = partial(n, c.block)
    found = [streamed("terms", 8.0 * n * EDITS) for _ in range(12)]  # torch operations in fp64
    found += [packed(n, width, 4)] * (2 if precision == "tf32" or 2 * EDITS % 16 else 0)
    found.append(symmetric("gram_update", k, n, width, 4, 6.0 * n * n + sums, factors=2))
    return [*found, streamed("near_energy", sums), streamed("energy_sum", sums)]


def projection(n: int, d: int, precision: str) -> list[Work]:
    """An update of rank `EDITS`, fp32 factors and n / 4 directions; ``"half"``: into a bf16 weight."""
    multiplied = "tf32x3" if precision == "half" else precision
    size, r = SIZE[precision], n // 4

    def of(rows: int, cols: int, **variant: Any) -> Kernel:
        block = config("product", multiplied, configs.side(rows, cols)).block
        return kernel("product_kernel", multiplied, block, **variant)

    # Kernels of ieee and tf32 with an addend were not compiled for the counts; the kernel without one replaces them.
    more = multiplied == "tf32x3"
    return [
        product("X U", of(EDITS, r), EDITS, r, d, (4, 4), 4),
        streamed("scale", 8.0 * EDITS * r),
        product("X - a (X U) U^T", of(EDITS, d, **({"addend": True} if more else {})), EDITS, d, r, (4, 4), 8),
        product("W += R X", of(n, d, **({"accumulate": True} if more else {})), n, d, EDITS, (4, 4), 2.0 * size),
    ]


def small(count: int, n: int, d: int) -> list[Work]:
    """Many small matrices, fp32 by tf32x3: a tile of 32 rows."""
    c = config("energy", "tf32x3", n)
    k = kernel("pair_energy_kernel", "tf32x3", c.block, s=1.0, fast=True)
    side = ceil(n / c.block)
    tiles = count * side * (side + 1) // 2
    read = 4.0 * count * n * width_of(d)
    sums = count * partial(n, c.block)
    return [
        packed(count * n, d, 4),
        tiled("pair_energy", k, tiles, width_of(d), tiles * 2.0 * c.block * width_of(d) * 4, read + sums),
        streamed("near_energy", sums),
        streamed("energy_sum", sums),
        streamed("sum", 8.0 * count * n),
    ]


OPERATIONS: dict[str, tuple[Callable[[int, int, str], list[Work]], tuple[str, ...]]] = {
    "energy": (energy, PRECISIONS),
    "energy with gradient": (gradient, PRECISIONS),
    "gram": (gram, PRECISIONS),
    "gram update with energy, b = 100": (update, ("tf32x3", "tf32", "ieee")),
    "projection applied, b = 100": (projection, ("tf32x3", "half")),
    "CUDA: energy": (cuda_energy, PRECISIONS),
    "CUDA: gram update with energy, b = 100": (cuda_update, ("tf32x3", "tf32", "ieee")),
}


def total(works: list[Work]) -> tuple[float, float, str]:
    """Seconds at best and expected, and the bound of the latter."""
    best, expected = sum(w.best for w in works), sum(w.expected for w in works)
    longest = max(works, key=lambda w: w.expected)
    if len(works) * LAUNCH > expected:
        return best, len(works) * LAUNCH, f"{len(works)} launches"
    return best, expected, f"{longest.name}: {longest.bound}"


def plain_product(n: int, d: int, precision: str) -> float:
    """Seconds of ``X @ X.T`` at the datasheet's rate: a lower bound for plain PyTorch."""
    rate = PLAIN["ieee"] if precision in ("ieee", "tf32x3") else MATRIX[precision]
    return 2.0 * n * n * d / rate


def breakdown(works: list[Work]) -> Iterator[str]:
    """A line for each launch."""
    for w in works:
        yield f"{w.name:18} best {1e3 * w.best:8.4f} ms  expected {1e3 * w.expected:8.4f} ms  {w.bound}"
