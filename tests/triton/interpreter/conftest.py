"""Fixtures of the interpreter lane."""

from __future__ import annotations

import pytest
import torch

from sphere_kernels._backends.triton import configs
from sphere_kernels.energy import triton as energy

TINY = configs.Config(16, 16, 1, 1)


@pytest.fixture(autouse=True)
def triton_only(monkeypatch):
    """``impl="auto"`` stands for the Triton kernels, and what `torch.empty` returns begins as NaN."""
    monkeypatch.setenv("SPHERE_KERNELS_IMPL", "triton")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(monkeypatch):
    """Tiles of 16 rows and 16 columns, groups of 32 rows, two matrices' slopes at a time."""
    monkeypatch.setattr(configs, "find", lambda *key: TINY)
    monkeypatch.setattr(configs, "ROWS", configs.Config(4, 16, 1, 1))
    monkeypatch.setattr(configs, "SUMS", configs.Config(16, 1, 1, 1))
    monkeypatch.setattr(energy, "GROUP", 32)
    monkeypatch.setattr(energy, "SLOPES", 2 * 32 * 32)
