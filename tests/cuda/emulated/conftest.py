"""Fixtures of the CUDA kernels on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "kernels"))

from guards import guarded, poisoned  # noqa: E402

from sphere_kernels._backends import cuda  # noqa: E402

assert cuda.cuda is not None and cuda.cuda.emulated


@pytest.fixture(autouse=True)
def cuda_only(monkeypatch):
    """``impl="auto"`` stands for the CUDA kernels; a page follows all memory that is asked for, which begins as NaN."""
    monkeypatch.setenv("SPHERE_KERNELS_IMPL", "cuda")
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: guarded(poisoned(empty(self, *a, **k))))


@pytest.fixture(params=("ieee", "tf32x3", "tf32"))
def precision(request, monkeypatch):
    """Runs the test once per way to multiply fp32."""
    monkeypatch.setenv("SPHERE_KERNELS_DOT", request.param)
    return request.param
