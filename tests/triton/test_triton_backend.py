"""What can be said of the Triton backend where it does not run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sphere_kernels import dispatch, hyperspherical_energy
from sphere_kernels._backends import gpu
from sphere_kernels._backends.triton import configs

OPS = ("gram", "gram_update_energy_", "pair_energy", "pair_energy_backward", "principal_directions", "products")
OPS += ("sparse_projection", "apply_projected_update_")
SHAPE = (1024, 1024)
HAS_TRITON = gpu.supports("cuda", torch.float32, SHAPE) is None


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_triton_on_gpus_only(op):
    if HAS_TRITON:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.select(op, "auto", "cuda", dtype, SHAPE) == "triton"
    assert dispatch.select(op, "auto", "cpu", torch.float32, SHAPE) in ("native", "reference")


def test_refusals_say_why(monkeypatch):
    with pytest.raises(ValueError, match="runs on CUDA and ROCm tensors .* not on cpu"):
        hyperspherical_energy(torch.ones(2, 2), impl="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.select("pair_energy", "auto", "cuda", torch.float32, SHAPE) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.select("pair_energy", "triton", "cuda", torch.float32, SHAPE)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_what_is_too_old_is_left_to_plain_torch(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_triton_version", lambda: (3, 2))
        assert dispatch.select("pair_energy", "auto", "cuda", torch.float32, SHAPE) == "reference"
        with pytest.raises(ValueError, match=r"it needs triton 3.5 or later, found 3.2"):
            dispatch.select("pair_energy", "triton", "cuda", torch.float32, SHAPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="it needs a GPU of sm_80 or later, found sm_75"):
        dispatch.select("pair_energy", "triton", "cuda", torch.float32, SHAPE)
    assert gpu._triton_version() >= gpu.OLDEST_TRITON


def test_import_leaves_triton_alone():
    code = "import sys, sphere_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_precision_by_architecture(monkeypatch):
    monkeypatch.delenv("SPHERE_KERNELS_DOT", raising=False)
    for arch, expected in (("sm_75", "ieee"), ("sm_80", "tf32x3"), ("sm_120", "tf32x3"), ("gfx942", "ieee")):
        assert gpu.precision(arch) == expected
    monkeypatch.setenv("SPHERE_KERNELS_DOT", "tf32x3")
    with pytest.raises(ValueError, match="must be auto or one of ieee, tf32 on gfx942, got 'tf32x3'"):
        gpu.precision("gfx942")


def test_architectures_share_tables():
    for arch, expected in (
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx950", "gfx942"),
    ):
        assert configs.table_for(arch) == expected


def test_shipped_configurations_are_pinned():
    """A change of a tile changes the order of sums: it is made on purpose."""
    assert configs.find("sm_90", "energy", "tf32x3", 4096) == (128, 32, 8, 3, None)
    assert configs.find("sm_90", "energy", "half", 4096) == (128, 64, 8, 3, None)
    assert configs.find("sm_80", "energy", "tf32x3", 4096) == (64, 32, 4, 3, None)
    assert configs.find("gfx942", "product", "ieee", 4096) == (64, 32, 8, 2, None)
    assert configs.find("sm_90", "energy", "tf32x3", 2049) == configs.find("sm_90", "energy", "tf32x3", 1 << 20)
    for n in (65, 2048):
        assert configs.find("sm_90", "energy", "tf32x3", n) == (64, 32, 4, 3, None)
        assert configs.find("gfx942", "product", "ieee", n) == (64, 32, 8, 2, None)
    assert [configs.side(*shape) for shape in ((64, 10**6), (100, 1024), (2048, 14336))] == [64, 452, 7662]
    assert configs.find("sm_90", "energy", "tf32x3", 64) == configs.SMALL_TILE
    for table in configs.TABLE.values():
        assert set(table) == {(kind, column) for kind in configs.KINDS for column in configs.OPERANDS}


def test_tiles_come_in_bands():
    schedule = pytest.importorskip("sphere_kernels._backends.triton.schedule")
    for side in (1, 2, 7, 8, 9, 20):
        tiles = schedule.triangle(side, torch.device("cpu"))
        assert {tuple(tile) for tile in tiles.tolist()} == {(i, j) for i in range(side) for j in range(i, side)}
        assert (tiles[:, 0] // schedule.BAND).diff().ge(0).all()
        tiles = schedule.rectangle(side, 5, torch.device("cpu"))
        assert sorted(map(tuple, tiles.tolist())) == [(i, j) for i in range(side) for j in range(5)]
