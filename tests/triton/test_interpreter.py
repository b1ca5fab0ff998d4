"""The interpreter lane: the kernels run on the CPU, in processes of their own, two at a time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of the contract that the kernel tests put to every implementation, what a slow interpreter can be asked each time.
# The rest passes too, in ten minutes: TRITON_INTERPRET=1 python -m pytest tests/kernels
CONTRACT = (
    "test_energy.py::test_reductions",
    "test_energy.py::test_near_duplicates_in_fp32_are_not_left_to_cancellation",
    "test_energy.py::test_exact_duplicates_take_the_clamp",
    "test_energy.py::test_zero_row_is_at_distance_one",
    "test_energy_gradient.py::test_exact_duplicates_are_clamped_and_do_not_pull",
    "test_energy_gradient.py::test_epsilon_of_the_normalisation_counts",
    "test_energy_gradient.py::test_zero_row_has_zero_gradient",
    "test_gram_energy.py::test_it_reads_the_upper_triangle_and_writes_nothing",
    "test_gram_energy.py::test_across_real_tiles",
    "test_gram_update.py::test_within_budget",
    "test_gram_update.py::test_diagonal_is_rounded_once",
    "test_gram_update.py::test_strided_matrix",
    "test_gram_update.py::test_near_rows_without_the_weight",
    "test_gram_update.py::test_inner_products_above_one_are_clamped",
    "test_gram_update.py::test_negative_diagonal_is_a_zero_row",
    "test_projection.py::test_in_place",
    "test_projection.py::test_computes_in_the_wider_dtype",
    "test_support.py::test_cells_are_true",
)
LANES = {
    "blocks": ["interpreter/test_blocks.py"],
    "memory": ["interpreter/test_memory.py"],
    "precision": ["interpreter/test_precision.py"],
    "contract": [f"../kernels/{name}" for name in CONTRACT],
}


@pytest.fixture(scope="module")
def lanes():
    """Each lane's process, begun at once; a test waits for its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, files) for name, files in LANES.items()}


def run(files):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPHERE_KERNELS_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("name", LANES)
def test_lane(lanes, name):
    done = lanes[name].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
