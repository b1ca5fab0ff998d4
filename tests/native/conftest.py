"""Fixtures of the native tests: every instruction set, numbers of threads, outputs that begin as NaN."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # the oracle and the shared inputs

from sphere_kernels import env  # noqa: E402
from sphere_kernels._backends import native

TIERS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=TIERS)
def tier(request, monkeypatch):
    """Runs the test once per instruction set that this machine has."""
    if request.param not in native.USABLE:
        pytest.skip(f"this machine or this build has no {request.param} kernels, only {', '.join(native.USABLE)}")
    monkeypatch.setenv(env.KERNELS_ISA.name, request.param)
    monkeypatch.delenv(env.KERNELS_IMPL.name, raising=False)
    return request.param


@pytest.fixture(autouse=True)
def outputs_begin_as_nan():
    """torch fills what `torch.empty` returns with NaN."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def with_threads():
    """A function that calls another under so many torch threads."""
    before = torch.get_num_threads()

    def call(count, function, *arguments):
        torch.set_num_threads(count)
        return function(*arguments)

    yield call
    torch.set_num_threads(before)
