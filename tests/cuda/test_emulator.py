"""cuda_cpu.h itself: it computes what a GPU would, and it notices what would go wrong on one."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest
import toolchain
import torch

pytestmark = pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))
FAULTS = {
    "divergent barrier": "threads wait in __syncthreads at line",
    "deadlock": "deadlock: 32 threads in __syncthreads, 32 in a warp call, 0 exited",
    "exited lane": "lane 3 of the mask of a warp call has exited",
    "not in mask": "lane 4 is not in the mask of its warp call",
    "unaligned source": "an address is not a multiple of its size",
    "unaligned destination": "an address is not a multiple of its size",
    "not shared": "the destination is not in shared memory",
    "reads too much": "reads more bytes than it copies",
    "in flight": "a thread exits while its copies are in flight",
    "not committed": "a thread exits with copies that it did not commit",
    "grid": "grid",
}
NONE, NO_WAIT, NO_BARRIER, NO_BARRIER_AFTER, WAITS_FOR_ALL_BUT_ONE = range(5)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source = toolchain.HERE / "cpp/check_emulator.cpp"
    return toolchain.linked([toolchain.compiled(source, folder, "-O1")], folder / "check_emulator")


@pytest.fixture(scope="module")
def under_thread_sanitizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source = toolchain.HERE / "cpp/check_emulator.cpp"
    flags = ("-O1", "-g", "-fsanitize=thread")
    return toolchain.linked([toolchain.compiled(source, folder, *flags)], folder / "check_emulator", *flags)


def settings(order="fwd", copies="late"):
    return os.environ | {"CUDA_CPU_ORDER": order, "CUDA_CPU_ASYNC": copies, "CUDA_CPU_THREADS": "2"}


def test_fragments_are_where_the_manual_has_them(emulator):
    toolchain.must(emulator, "products")


def test_threads_exchange_values(emulator):
    for order in ("fwd", "rev", "7"):
        for copies in ("late", "early"):
            toolchain.must(emulator, "rotate", NONE, env=settings(order, copies))


@pytest.mark.parametrize("fault", (NO_WAIT, NO_BARRIER, NO_BARRIER_AFTER, WAITS_FOR_ALL_BUT_ONE))
def test_what_is_missing_shows_in_values(emulator, fault):
    for order in ("fwd", "rev", "7"):
        done = toolchain.run(emulator, "rotate", fault, env=settings(order))
        assert (done.returncode, done.stdout) == (1, "a wrong value\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_end_the_launch(emulator, fault):
    done = toolchain.run(emulator, fault)
    assert done.returncode == 1
    assert FAULTS[fault] in done.stdout


def test_shared_memory_begins_as_nan(emulator):
    toolchain.must(emulator, "unwritten", env=settings())


def test_a_page_follows_dynamic_shared_memory(emulator):
    toolchain.must(emulator, "reach", 63)
    assert toolchain.run(emulator, "reach", 64).returncode == -signal.SIGSEGV


def test_much_shared_memory_has_to_be_asked_for(emulator):
    assert "not asked for" in toolchain.run(emulator, "shared", 50000).stdout
    toolchain.must(emulator, "shared", 50000, "asks")
    assert toolchain.run(emulator, "shared", 110000, "asks").stdout.startswith("1 ")  # cudaErrorInvalidValue


@pytest.mark.parametrize(("arguments", "races"), [(("rotate", NONE), False), (("rotate", NO_BARRIER_AFTER), True),
                                                  (("same place",), True)])  # fmt: skip
def test_races_are_reported(under_thread_sanitizer, arguments, races):
    done = toolchain.run(under_thread_sanitizer, *arguments, env=settings(copies="early"))
    assert ("data race" in done.stderr) == races, done.stderr


def test_portable_switch_of_stacks(tmp_path):
    source = toolchain.HERE / "cpp/check_emulator.cpp"
    program = toolchain.linked(
        [toolchain.compiled(source, tmp_path, "-O1", "-DCUDA_CPU_UCONTEXT")], tmp_path / "portable"
    )
    toolchain.must(program, "products")
    toolchain.must(program, "rotate", NONE)


def test_conversions_are_torchs(tmp_path):
    (tmp_path / "conversions.cpp").write_text(
        """#include "cuda_cpu.h"
        #define VISIBLE extern "C" __attribute__((visibility("default"))) void
        VISIBLE wide(const uint16_t* x, float* bf16, float* fp16, int n) {
            for (int i = 0; i < n; ++i) bf16[i] = __bfloat162float({x[i]}), fp16[i] = __half2float({x[i]});
        }
        VISIBLE narrow(const double* x, uint16_t* bf16, uint16_t* fp16, uint32_t* tf32, int n) {
            for (int i = 0; i < n; ++i) {
                bf16[i] = __double2bfloat16(x[i]).bits, fp16[i] = __double2half(x[i]).bits;
                tf32[i] = to_tf32(float(x[i]));
            }
        }"""
    )
    made = toolchain.compiled(tmp_path / "conversions.cpp", tmp_path, "-O1")
    library = ctypes.CDLL(str(toolchain.linked([made], tmp_path / "conversions.so", "-shared")))

    def call(name, *tensors):
        getattr(library, name)(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), len(tensors[0]))

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    bf16, fp16 = torch.empty(1 << 16), torch.empty(1 << 16)
    call("wide", every, bf16, fp16)
    torch.testing.assert_close(bf16, every.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fp16, every.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    finite = torch.cat([x[x.isfinite()] for x in (bf16, fp16)]).double()
    between = (finite.sort().values[1:] + finite.sort().values[:-1]) / 2  # ties
    x = torch.cat(
        [finite, between, between * (1 + 1e-7), finite.new_tensor([float("nan"), float("inf"), -1e300, 65520])]
    )
    x = x.float().double()  # what torch rounds once
    bits = torch.empty(len(x), dtype=torch.int16), torch.empty(len(x), dtype=torch.int16)
    tf32 = torch.empty(len(x), dtype=torch.int32)
    call("narrow", x, *bits, tf32)
    for found, dtype in zip(bits, (torch.bfloat16, torch.float16), strict=True):
        torch.testing.assert_close(found.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    normal = (x.abs() > 1e-37) & (x.abs() < 1e38)
    exact, rounded = x[normal], tf32.view(torch.float32)[normal].double()
    unit = 2.0 ** (exact.abs().log2().floor() - 10)
    assert ((exact / unit).abs() + 0.5).floor().mul(unit).mul(exact.sign()).equal(rounded)  # ties away from zero
    assert tf32.view(torch.float32)[x.isnan()].isnan().all()
