"""The compiled CPU module loads, and tells the truth about the processor."""

import platform
from pathlib import Path

import pytest

from sphere_kernels import _cpu


def linux_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="compares with /proc/cpuinfo of an x86-64 Linux",
)
def test_features_are_those_the_kernel_lists():
    features = _cpu.cpu_features()
    flags = linux_flags()
    assert features == {name: name in flags for name in features}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
def test_every_tier_that_dispatch_may_ask_for_is_reported():
    assert {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"} <= _cpu.cpu_features().keys()


@pytest.mark.skipif(platform.machine() not in ("aarch64", "arm64"), reason="names Arm instruction sets")
def test_arm_always_has_neon():
    assert _cpu.cpu_features()["neon"] is True


def test_the_answer_is_a_fresh_dict_of_bools():
    first = _cpu.cpu_features()
    assert all(type(value) is bool for value in first.values())
    first.clear()
    assert _cpu.cpu_features() == _cpu.cpu_features()
