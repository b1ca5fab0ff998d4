"""The model of docs/gpu.md: its tables are computed, and its counts are those of a hand."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from benchmarks import gpu_instructions, gpu_model, gpu_page
from sphere_kernels._backends.triton import configs, schedule


def test_the_page_has_the_tables_of_the_model():
    page = gpu_page.PAGE.read_text()
    assert gpu_page.render(page) == page
    assert set(re.findall("<!-- table ([a-z0-9-]+) -->", page)) == set(gpu_page.TABLES)


def test_a_changed_figure_is_noticed():
    page = gpu_page.PAGE.read_text()
    line = next(line for line in page.splitlines() if line.startswith("| energy | 4096"))
    changed = page.replace(line, line.replace("| energy |", "| energy | 1"))
    assert gpu_page.render(changed) == page


def test_every_prediction_says_that_it_is_one():
    for name in ("gpu-times", "gpu-against"):
        assert gpu_page.TABLES[name]().startswith("| prediction, not measured |")


@pytest.mark.parametrize("precision", gpu_model.PRECISIONS)
@pytest.mark.parametrize("shape", gpu_model.SHAPES)
def test_operations_and_bytes_are_those_of_the_formulas(shape, precision):
    n, d = shape
    work = next(w for w in gpu_model.energy(n, d, precision) if w.name == "pair_energy")
    block, size = gpu_model.config("energy", precision, n).block, gpu_model.SIZE[precision]
    side = -(-n // block)
    assert work.l2 == side * (side + 1) * block * d * size
    if precision != "ieee":  # counted in the machine code, against the definition
        assert work.flops == pytest.approx(side * (side + 1) * block**2 * d * (3 if precision == "tf32x3" else 1))
    assert work.dram >= n * d * size + 8 * n * side
    assert work.dram <= work.l2 + 8 * n * side


def test_rows_met_by_blocks_that_run_together():
    tiles = schedule.triangle(20, torch.device("cpu"))
    expected = 0
    for start in range(0, len(tiles), 7):
        expected += len({index for tile in tiles[start : start + 7].tolist() for index in tile})
    assert gpu_model.met(tiles, 1, 7) == gpu_model.triangle(20, 7) == expected
    assert gpu_model.met(tiles, 64, 10**6) == 20 * 64


def test_nothing_is_faster_than_its_bound():
    for make, precisions in gpu_model.OPERATIONS.values():
        for shape, precision in itertools.product(gpu_model.SHAPES, precisions):
            works = make(*shape, precision)
            best, expected, _ = gpu_model.total(works)
            assert 0 < best <= expected
            assert all(w.best <= w.expected * (1 + 1e-9) for w in works)


def test_more_work_takes_longer():
    for precision in gpu_model.PRECISIONS:
        times = [gpu_model.total(gpu_model.energy(4096, d, precision))[0] for d in (1024, 4096, 16384)]
        assert times == sorted(times) and times[2] > 3 * times[1]


LOOP = """
        /*0010*/                   MOV R1, R2 ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/              @!P0 HGMMA.64x128x8.F32.TF32 R24, R116, gdesc[UR36], R24 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   MUFU.RSQ R3, R4 ;
        /*0070*/                   DADD R4, R4, R6 ;
.L_x_1:
        /*0080*/                   BRA `(.L_x_1);
"""


def test_instructions_are_counted_in_and_out_of_the_loop():
    found = gpu_instructions.split(LOOP)
    assert found["loop"]["issued"] == 4 and found["loop"]["alu"] == 1
    assert found["loop"]["matrix_flops"] == 2 * 64 * 128 * 8 / 4
    assert found["outside"]["issued"] == 4
    assert found["outside"]["mufu"] == found["outside"]["fp64"] == 1
    assert gpu_instructions.flops("HMMA.1688.F32.TF32") == 2 * 16 * 8 * 8
    assert gpu_instructions.flops("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    assert gpu_instructions.flops("DMMA.16x8x16") == 2 * 16 * 8 * 16


def test_the_counts_are_of_the_shipped_configurations():
    """A configuration that was changed since is not among them: python -m benchmarks.gpu_instructions counts anew."""
    rows = json.loads(gpu_instructions.RESULT.read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    seen = {(row["kernel"], row["precision"], row["block"], row["depth"], row["warps"]) for row in rows}
    kinds = {
        "energy": "pair_energy",
        "gram": "gram",
        "update": "gram_update",
        "slopes": "pair_slopes",
        "product": "product",
    }
    for kind, name in kinds.items():
        for precision in ("tf32x3", "tf32", "ieee"):
            config = configs.find("sm_90", kind, precision, 4096)
            assert (f"{name}_kernel", precision, *config[:3]) in seen, (kind, precision)
