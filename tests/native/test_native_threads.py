"""Threads, processes and memory: the same bits whoever computes them, and little memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import all_figures, energy
from cases import VARIANTS, randn

WIDE = (torch.float64, torch.float32)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


def assert_same(first, second):
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"figure {position}"


# One tile and several, a batch side by side, groups of rows in the backward pass.
@pytest.mark.parametrize(
    ("leading", "n", "d"), [((), 60, 90), ((), 300, 33), ((), 1100, 20), ((5,), 70, 40), ((), 1600, 5)]
)
@pytest.mark.parametrize("dtype", (*WIDE, torch.bfloat16), ids=str)
def test_threads_and_repetition_change_no_bit(tier, dtype, leading, n, d, with_threads):
    first = with_threads(1, all_figures, leading, n, d, dtype)
    for threads in (2, 3, 1):
        assert_same(with_threads(threads, all_figures, leading, n, d, dtype), first)


def test_threads_and_options(tier, with_threads):
    for (distance, half_space), s in itertools.product(VARIANTS, (0.0, 1.0, 2.0)):
        options = {"distance": distance, "half_space": half_space, "s": s}
        results = [with_threads(count, lambda o=options: all_figures((), 250, 12, **o)) for count in (1, 2)]
        assert_same(*results)


def test_near_pairs_are_added_in_a_fixed_order(tier, with_threads):
    weight = (randn(1, 700) + 1e-3 * randn(400, 700, seed=1)).float().requires_grad_()
    results = []
    for count in (1, 2, 2, 3):
        values = with_threads(count, energy, weight)
        results.append((values.detach(), *torch.autograd.grad(values.sum(), weight)))
    for other in results[1:]:
        assert_same(results[0], other)


def test_many_python_threads_at_once(tier):
    expected = all_figures((), 200, 20)
    with ThreadPoolExecutor(8) as pool:
        for figures in pool.map(lambda _: all_figures((), 200, 20), range(24)):
            assert_same(figures, expected)


def test_the_lock_of_the_interpreter_is_released(tier, with_threads):
    weight = randn(3000, 3, dtype=torch.float32)
    finished = threading.Event()

    def work():
        with_threads(1, energy, weight, 0.5, "angular")  # hundreds of milliseconds
        finished.set()

    worker = threading.Thread(target=work)
    worker.start()
    ticks = 0
    while not finished.is_set():
        time.sleep(1e-3)
        ticks += 1
    worker.join()
    assert ticks > 10  # with the lock held this thread would have slept once


def run(code, **environment):
    """What a Python process prints; one that does not end fails."""
    here = Path(__file__).parent
    setup = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent / 'kernels')!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", setup + code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
    )


@LINUX
def test_forked_child():
    # Few enough elements that torch's own operations, which hang in a forked child, stay on one thread.
    done = run("""
import os, torch
from calls import all_figures
torch.set_num_threads(2)
for dtype in (torch.float32, torch.float64):
    expected = all_figures((), 170, 40, dtype)
    batch = all_figures((6,), 60, 40, dtype)
    child = os.fork()
    if child == 0:
        same = all(map(torch.equal, all_figures((), 170, 40, dtype), expected))
        same &= all(map(torch.equal, all_figures((6,), 60, 40, dtype), batch))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if all(map(torch.equal, all_figures((), 170, 40, dtype), expected)) else 1)
        os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(map(torch.equal, all_figures((), 170, 40, dtype), expected))  # the parent still has its threads
print("same")
""")
    assert done.stdout.strip() == "same", done.stderr


@LINUX
@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [
        (4096, 2048, "float32"),
        (4096, 2048, "bfloat16"),
        (20000, 16, "float32"),
        (6144, 850, "float32"),
        (3000, 3000, "float64"),
    ],
)
def test_extra_memory_of_the_energy(n, d, dtype):
    done = run(f"""
import re, torch
from sphere_kernels import hyperspherical_energy
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(2)
hyperspherical_energy(torch.randn(300, 300), impl="native")
weight = torch.empty({n}, {d}, dtype=torch.{dtype}).normal_()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
hyperspherical_energy(weight, impl="native")
print(status("VmHWM") - before)
""")
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout)
    print(f"{extra:.1f} MB")
    assert 0 < extra <= 32
