"""What each way to multiply does to values: tf32 and 16-bit operands by exact emulation, as tensor cores see them."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_kernels import gram, hyperspherical_energy, principal_directions
from sphere_kernels._products import products_for


class HostNumbers(TorchDispatchMode):
    """Counts the numbers that come from a tensor to Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def rounded(x):
    """To the 11 bits of tf32, ties away from zero."""
    return ((x.float().contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def error_of(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def test_tf32_rounds_operands_to_nearest(monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", "tf32")
    a, b = randn(20, 48, dtype=torch.float32), randn(48, 24, dtype=torch.float32, seed=1)
    exact = rounded(a).double() @ rounded(b).double()
    assert error_of(products_for(a).matmul(a, b), exact) < 2e-7
    assert error_of(products_for(a).matmul(a, b), a.double() @ b.double()) > 2e-5
    assert error_of(gram(a), rounded(a).double() @ rounded(a).double().T) < 2e-7
    # Of the energy little is left of it: the operands' errors are as often up as down.
    energy, expected = hyperspherical_energy(a), oracle.per_neuron(a).sum()
    assert 1e-12 < abs(energy / expected - 1) < 1e-5


@pytest.mark.parametrize("precision", ("ieee", "tf32x3"))
def test_fp32_stays_fp32(precision, monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", precision)
    a = randn(20, 48, dtype=torch.float32)
    assert error_of(gram(a), a.double() @ a.double().T) < 3e-7
    assert error_of(hyperspherical_energy(a, reduction="none"), oracle.per_neuron(a)) < 1e-7


@pytest.mark.parametrize(
    ("precision", "inner", "neuron", "total"),
    [("ieee", 1e-6, 1e-8, 1e-9), ("tf32x3", 1e-6, 1e-8, 1e-9), ("tf32", 1e-3, 1e-5, 1e-6)],
)
def test_errors_that_the_readme_states(precision, inner, neuron, total, monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", precision)
    a = randn(64, 1536, dtype=torch.float32)
    unit, expected = oracle.unit_rows(a.double()), oracle.per_neuron(a)
    energy = hyperspherical_energy(a, reduction="none")
    assert (gram(a, normalize=True) - unit @ unit.T).abs().max() < inner
    assert (energy / expected - 1).abs().max() < neuron
    assert abs(energy.sum() / expected.sum() - 1) < total


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_operands_are_exact(dtype):
    a = randn(20, 48, dtype=dtype)
    assert error_of(gram(a), a.double() @ a.double().T) < 3e-7
    assert error_of(hyperspherical_energy(a, reduction="none"), oracle.per_neuron(a)) < 1e-7


def test_what_is_not_finite_survives_rounding(monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", "tf32")
    a = torch.eye(16)
    a[3, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that GPUs produce
    assert gram(a)[3].isnan().any()
    assert products_for(a).matmul(a, torch.eye(16))[3].isnan().any()


def test_an_unknown_precision_is_named(monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_DOT", "fp8")
    with pytest.raises(ValueError, match="SPHERE_KERNELS_DOT must be one of auto, ieee, tf32x3, tf32, got 'fp8'"):
        gram(torch.eye(3))


def test_no_bias_in_fp32():
    """Over eight draws the mean error stays within what their scatter explains; lengths of 0.3 lack what counts."""
    errors = []
    for seed in range(8):
        weight = randn(90, 16, seed=seed).float() * 0.3 / 4
        errors.append(float(hyperspherical_energy(weight) / oracle.per_neuron(weight).sum() - 1))
    spread = torch.tensor(errors, dtype=torch.float64)
    assert abs(spread.mean()) < 5 * spread.std() / 8**0.5 + 1e-12


@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)])
def test_principal_directions(shape):
    weight = randn(*shape, dtype=torch.float32)
    with HostNumbers() as seen:
        found = principal_directions(weight)
    assert seen.count <= (3 if shape[-2] < shape[-1] else 4)  # are the norms sound, the rank, the spread of eigenvalues
    expected = principal_directions(weight.double(), impl="reference")
    assert torch.equal(found.rank, expected.rank)
    torch.testing.assert_close(found.eigenvalues.double(), expected.eigenvalues, rtol=1e-5, atol=1e-6)
    projector = found.basis @ found.basis.mT
    torch.testing.assert_close(projector.double(), expected.basis @ expected.basis.mT, rtol=0, atol=1e-4)


def test_a_tensor_without_memory_is_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="tensors with memory, got a FakeTensor"):
        principal_directions(torch.randn(4, 8), impl="triton")
