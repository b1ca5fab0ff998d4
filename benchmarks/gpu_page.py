"""The tables of docs/gpu.md, from the model: ``python -m benchmarks.gpu_page``."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path

from benchmarks.gpu_model import (
    BATCH,
    MATRIX,
    MULTIPROCESSORS,
    OPERATIONS,
    PRECISIONS,
    SHAPES,
    SIZE,
    Kernel,
    config,
    cuda_kernel,
    energy,
    kernel,
    partial,
    plain_product,
    small,
    total,
)
from benchmarks.kernel_tables import filled, table

PAGE = Path(__file__).resolve().parents[1] / "docs/gpu.md"
RESULTS = Path(__file__).parent / "results"
FIRST = 4  # the first edited block
# Blocks, weights of the linear maps of one block, weights of the head.
MODELS = {"SmolLM2-135M": (30, 3_538_944, 28_311_552), "Llama-3-8B": (32, 218_103_808, 525_336_576)}


def times() -> str:
    """Predicted times of every operation, shape and precision."""
    cells = []
    for name, (make, precisions) in OPERATIONS.items():
        for n, d in SHAPES:
            for precision in precisions:
                best, expected, bound = total(make(n, d, precision))
                cells.append([name, f"{n} × {d}", _named(precision), _ms(best), _ms(expected), bound])
    best, expected, bound = total(small(*BATCH))
    cells.append(["energy of many small", " × ".join(map(str, BATCH)), "tf32x3", _ms(best), _ms(expected), bound])
    head = ["prediction, not measured", "shape", "operands", "at best, ms", "expected, ms", "bound by"]
    return table(head, cells)


def kernels() -> str:
    """Costs of a step of the inner dimension and of a pair, in the kernels for s = 1 compiled for sm_90."""
    found = []
    for kind, name, variant in (
        ("energy", "pair_energy_kernel", {"s": 1.0, "fast": True}),
        ("slopes", "pair_slopes_kernel", {"s": 1.0, "fast": True}),
        ("gram", "gram_kernel", {}),
        ("update", "gram_update_kernel", {"s": 1.0, "fast": True}),
        ("product", "product_kernel", {}),
    ):
        for precision in PRECISIONS:
            if (kind, precision) not in (("update", "half"), ("gram", "half")):
                block = config(kind, precision, 4096).block
                found.append((name.removesuffix("_kernel"), precision, kernel(name, precision, block, **variant)))
    for name, side, precisions in (("pair_energy", 128, PRECISIONS), ("gram_update", 64, PRECISIONS[:3])):
        found += [(f"CUDA: {name}", p, cuda_kernel(f"{name}_kernel", p, side)) for p in precisions]
    head = ["kernel", "operands", "tile", "warps", "blocks per SM", "instructions of a warp, a step"]
    head += ["clocks of the matrix units, a step", "clocks of the busiest other pipe, a step"]
    head += ["matrix work over what is needed", "other instructions per pair"]
    return table(head, [_kernel_cells(*each) for each in found])


def _kernel_cells(name: str, precision: str, k: Kernel) -> list[str]:
    step, block = k.cycles(1, once=False), k.row["block"]
    matrix, rest = step.pop("matrix"), max(step.values())
    useful = 2 * block**2 * k.row["depth"] * (3 if precision == "tf32x3" else 1)
    executed = k.row["loop"]["matrix_flops"] * k.row["warps"] / k.unroll
    return [
        name,
        _named(precision),
        f"{block} × {block} × {k.row['depth']}",
        str(k.row["warps"]),
        str(k.blocks),
        f"{k.count('issued', 1, once=False):.0f}",
        f"{matrix:.0f}" if executed else "–",
        f"{rest:.0f} ({max(step, key=lambda pipe: step[pipe])})",
        f"{executed / useful:.2f}×" if executed else "–",
        f"{k.count('issued', 0) * k.row['warps'] * 32 / block**2:.0f}",
    ]


def work() -> str:
    """Least and actual work of the forward pass, by shape and precision."""
    cells = []
    for n, d in SHAPES:
        for precision in ("tf32x3", "half"):
            found = next(w for w in energy(n, d, precision) if w.name == "pair_energy")
            block = config("energy", precision, n).block
            side = ceil(n / block)
            tiles = side * (side + 1) // 2
            k = kernel("pair_energy_kernel", precision, block, s=1.0, fast=True)
            useful = 1.0 * n * n * d
            cells.append(
                [
                    f"{n} × {d}",
                    _named(precision),
                    f"{useful / 1e9:.4g}",
                    f"{found.flops / useful:.2f}×",
                    f"{tiles}",
                    f"{tiles / (MULTIPROCESSORS * k.blocks):.2f}",
                    f"{n * d * SIZE[precision] / 1e6:.4g}",
                    f"{found.dram / 1e6:.4g}",
                    f"{found.l2 / 1e6:.4g}",
                    f"{partial(n, block) / 1e6:.3g}",
                ]
            )
    head = ["n × d", "operands", "n² d, Gflop", "executed", "tiles", "rounds of 132 SMs", "weight, MB"]
    return table([*head, "DRAM, MB", "L2 to SMs, MB", "sums per tile, MB"], cells)


def against() -> str:
    """The forward pass beside the lower bound for plain PyTorch."""
    cells = []
    for n, d in SHAPES:
        for precision in PRECISIONS:
            best, expected, _ = total(energy(n, d, precision))
            product = plain_product(n, d, precision)
            cells.append([f"{n} × {d}", _named(precision), _ms(product), _ms(best), _ms(expected)])
    head = ["prediction, not measured", "operands", "X @ X.T at the datasheet's rate, ms", "energy at best, ms"]
    return table([*head, "energy expected, ms"], cells)


def editing() -> str:
    """Flops per fact in the closed loop, and the resulting facts per second."""
    stored = json.loads((RESULTS / "targets.json").read_text())
    info = next(b["extra_info"] for b in stored["benchmarks"] if b["name"] == "test_edits[closed_loop]")
    cells = []
    for name, (blocks, weights, head) in MODELS.items():
        flops = fact_flops(info["tokens"], info["passes"], blocks, weights, head)
        counted = f"{info['gflops_per_fact']:.3g}" if name == "SmolLM2-135M" else "–"
        best, expected = MATRIX["half"] / flops, 0.5 * MATRIX["half"] / flops
        cells.append([name, f"{flops / 1e9:.3g}", counted, f"{best:.3g}", f"{expected:.3g}"])
    head_row = ["prediction, not measured", "Gflop per fact", "counted, with padding", "facts per second at best"]
    return table([*head_row, "at half of the rate"], cells)


def fact_flops(tokens: dict[str, float], passes: float, blocks: int, weights: int, head: int) -> float:
    """Flops of the linear maps for one fact of a batch.

    The tokens before the subject run once, the tokens from the subject on run once through all blocks; then each pass
    runs forward and backward from the first edited block on; a whole pass follows at the end.

    Args:
        tokens: token counts of a fact, from ``results/targets.json``.
        blocks, weights, head: number of blocks, weights of the linear maps of one block, weights of the head.
    """
    before, tail, reads = tokens.values()
    once = blocks * weights * (2 * (before + tail)) + reads * head
    rounds = 2 * passes * ((blocks - FIRST) * weights * tail + reads * head)
    return 2 * (once + rounds)


def _named(precision: str) -> str:
    return {"half": "bf16"}.get(precision, f"fp32 {precision}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


TABLES: dict[str, Callable[[], str]] = {
    "gpu-kernels": kernels,
    "gpu-work": work,
    "gpu-times": times,
    "gpu-against": against,
    "gpu-editing": editing,
}


def render(page: str) -> str:
    """``page`` with all tables rewritten."""
    return filled(page, lambda name: TABLES[name]())


def main() -> None:
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    main()
