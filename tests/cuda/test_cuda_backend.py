"""What can be said of the CUDA backend where it does not run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from sphere_kernels import LowRankUpdate, apply_projected_update_, dispatch, gram_update_energy_
from sphere_kernels import hyperspherical_energy as energy
from sphere_kernels._backends import cuda

OPS = ("pair_energy", "gram_update_energy_", "sparse_projection", "apply_projected_update_")
SHAPE = (1024, 1024)
BUILT = pytest.mark.skipif(cuda.cuda is None and os.environ.get("SPHERE_KERNELS_CUDA") != "1", reason=str(cuda.failure))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_it_takes_cuda_tensors_only():
    weight, basis = torch.ones(4, 5), torch.eye(5)[:, :2]
    calls = [
        lambda: energy(weight, impl="cuda"),
        lambda: gram_update_energy_(weight @ weight.T, weight, weight, torch.eye(5), impl="cuda"),
        lambda: apply_projected_update_(weight, LowRankUpdate(torch.ones(4, 1), torch.ones(1, 5)), basis, impl="cuda"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="it runs on CUDA tensors, not on cpu"):
            call()
    assert torch.equal(weight, torch.ones(4, 5))


@pytest.mark.parametrize("op", OPS)
def test_it_is_a_choice_and_never_chosen(op, monkeypatch):
    monkeypatch.setattr(cuda, "failure", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.select(op, "auto", "cuda", dtype, SHAPE) == "triton"
        assert dispatch.select(op, "cuda", "cuda", dtype, SHAPE) == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without triton, too
    assert dispatch.select(op, "auto", "cuda", torch.float32, SHAPE) == "reference"


def test_without_the_module_it_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "failure", "the CUDA module was not built")
    with pytest.raises(ValueError, match="impl='cuda' is not available for pair_energy: the CUDA module was not built"):
        dispatch.select("pair_energy", "cuda", "cuda", torch.float32, SHAPE)


def test_it_has_no_gradient():
    with pytest.raises(ValueError, match="no backward pass"):
        energy(torch.ones(4, 5, requires_grad=True), impl="cuda")
    with pytest.raises(ValueError, match="no backward pass"):
        dispatch.select("pair_energy_backward", "cuda", "cuda", torch.float32, SHAPE)


@BUILT
@NO_GPU
def test_a_launch_without_a_driver_is_an_error_and_no_crash():
    code = """if True:
        from sphere_kernels._backends import cuda
        matrix = (4096, 1, 1, 2, 2, 4, 2, 1)
        calls = {
            "device_count": (),
            "pair_energy": (matrix, 1.0, False, False, 0, 4096, 4096, 0),
            "gram_update_energy": (matrix, matrix, matrix, 4096, None, 1.0, False, False, 0, 4096, 4096, 0),
            "product": (matrix, matrix, None, matrix, 1.0, False, False, 0, 0),
        }
        for name, arguments in calls.items():
            try:
                print(getattr(cuda.cuda, name)(*arguments))
            except RuntimeError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    count, *errors = done.stdout.splitlines()
    assert (done.returncode, done.stderr, count, len(errors)) == (0, "", "0", 3)
    for error in errors:
        assert error.startswith("no CUDA driver or device: "), error


@BUILT
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_module_needs_no_cuda_library():
    assert cuda.cuda is not None
    needed = subprocess.run(["objdump", "-p", cuda.cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "torch" in line)] == []
