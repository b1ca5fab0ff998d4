"""The CUDA kernels at sizes off every block edge, against fp64; the last element of every tensor is before a page."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import DTYPES, VARIANTS, crowded, randn, update_inputs
from guards import guarded

from sphere_kernels import LowRankUpdate, apply_projected_update_, gram_update_energy_, hyperspherical_energy
from sphere_kernels import sparse_projection as project
from sphere_kernels._backends import cuda

# Around a chunk of 16 bytes, a slab of 128, tiles of 64 and 128, a warp of rows.
SIZES = [(1, 1), (2, 3), (15, 16), (31, 4), (33, 17), (63, 31), (64, 32), (65, 33), (97, 65), (129, 5), (130, 96)]
PLAIN, GENERAL = (1.0, "euclidean", False), (1.5, "angular", True)


def energies(weight, s=1.0, distance="euclidean", half_space=False):
    return hyperspherical_energy(weight, s, reduction="none", distance=distance, half_space=half_space)


def near(actual, expected, tolerance):
    """Row by row, relative to the row."""
    assert actual.dtype == torch.float64
    error = (actual - expected).abs() / (expected.abs() + 1e-3)
    assert (error <= tolerance).all(), error.max()


def budget(dtype, d, precision="tf32x3"):
    """Relative error of a neuron's energy; pairs of few dimensions are close, and their distances cancel."""
    if dtype == torch.float64:
        return 1e-9
    return (4e-4 if precision == "tf32" and dtype == torch.float32 else 1e-6) * (100 if d < 7 else 1)


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_energy(n, d, dtype):
    weight = guarded(randn(n, d, dtype=dtype))
    if d == 1:
        weight *= 1e-8  # unit rows of different lengths, not all coincident
    for options in (PLAIN, (2.0, "euclidean", False), GENERAL):
        near(energies(weight, *options), oracle.per_neuron(weight, *options), budget(dtype, d))


@pytest.mark.parametrize(("n", "d"), [(67, 33), (130, 96)])
def test_energy_in_every_precision(n, d, precision):
    weight = guarded(randn(n, d, dtype=torch.float32))
    for options in (PLAIN, GENERAL):
        near(energies(weight, *options), oracle.per_neuron(weight, *options), budget(torch.float32, d, precision))


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coincident_rows_across_tiles(dtype, distance, half_space):
    order = torch.randperm(135, generator=torch.Generator().manual_seed(1))
    weight = guarded(torch.cat([crowded(), randn(111, 9, seed=3)])[order].to(dtype))
    for s in (1.0, 0.0, 2.0):
        options = (s, distance, half_space)
        near(energies(weight, *options), oracle.per_neuron(weight, *options), 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("n", "b"), [(1, 1), (17, 0), (63, 8), (65, 9), (130, 17)])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_gram_update(n, b, dtype):
    (matrix, *factors), weight = update_inputs(randn(2, n, 24), b, dtype)
    wide = [t.double() for t in (matrix, *factors)]
    expected = wide[0] + wide[2] @ wide[1].mT + wide[1] @ wide[2].mT + wide[1] @ wide[3] @ wide[1].mT
    for variant in (("euclidean", False), ("angular", True)):
        updated = guarded(matrix.clone().mul_(torch.ones(n, n).triu()).to(dtype))  # nothing is read below the diagonal
        energy = gram_update_energy_(
            updated, *(guarded(t) for t in factors), distance=variant[0], half_space=variant[1]
        )
        assert torch.equal(updated, updated.mT)
        assert (updated - expected).abs().max() <= 40 * torch.finfo(dtype).eps * expected.abs().max()
        near(energy, oracle.per_neuron(weight, 1.0, *variant), 1e-12 if dtype == torch.float64 else 1e-5)


def test_gram_update_in_every_precision(precision):
    (matrix, *factors), weight = update_inputs(randn(67, 24), 5, torch.float32)
    expected = update_inputs(randn(67, 24), 5)[1]
    energy = gram_update_energy_(matrix, *factors)
    error = (matrix - expected @ expected.mT).abs().max()
    assert error <= (2e-3 if precision == "tf32" else 4e-6) * expected.square().sum(-1).max()
    near(energy, oracle.per_neuron(weight), 2e-3 if precision == "tf32" else 1e-5)


def test_a_refused_launch_is_an_error():
    many = (4096, 1, 1 << 50, 1, 1, 0, 1, 1)  # more blocks than a grid of two dimensions holds
    with pytest.raises(RuntimeError, match="product_kernel was not launched: .*grid .CUDA error 9."):
        cuda.cuda.product(many, many, None, many, 1.0, False, False, 0, 0)


@pytest.mark.parametrize(("n", "b", "d", "r"), [(1, 1, 1, 1), (15, 16, 17, 2), (63, 3, 65, 33), (66, 31, 129, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(n, b, d, r, dtype):
    basis = guarded(torch.linalg.qr(randn(d, r)).Q.to(dtype))
    weight, left, right = (randn(2, *shape, dtype=dtype, seed=2) for shape in ((n, d), (n, b), (b, d)))
    wide, directions = [t.double() for t in (weight, left, right)], basis.double()
    place = torch.finfo(dtype).eps

    def projected(x):
        return x - 0.5 * x @ directions @ directions.mT

    close = 1e-12 if dtype == torch.float64 else 4e-6 * (b + d) ** 0.5
    for actual, expected in (
        (project(guarded(weight), basis), projected(wide[0])),
        (
            apply_projected_update_(guarded(weight), LowRankUpdate(guarded(left), guarded(right)), basis),
            wide[0] + wide[1] @ projected(wide[2]),
        ),
    ):
        assert actual.dtype == dtype
        assert ((actual.double() - expected).abs() <= 0.5 * place * expected.abs() + close).all()


def test_projection_in_every_precision(precision):
    update, basis = randn(70, 90, dtype=torch.float32), torch.linalg.qr(randn(90, 20)).Q.float()
    expected = update.double() - 0.5 * update.double() @ basis.double() @ basis.double().mT
    error = (project(update, basis) - expected).abs().max()
    assert error <= (4e-3 if precision == "tf32" else 2e-6)
    assert error > 1e-5 or precision != "tf32"  # or it was not asked


def test_repetition_and_batches_give_the_same_bits(precision):
    for dtype in (torch.float32, torch.bfloat16):
        weight = randn(3, 67, 33, dtype=dtype)
        weight[2, 4] = weight[2, 60]
        together = energies(weight)
        assert torch.equal(together, energies(weight))
        for m in range(3):
            assert torch.equal(together[m], energies(weight[m]))
        (matrix, *factors), _ = update_inputs(randn(2, 67, 24), 5, torch.float32)
        first, second = matrix.clone(), matrix.clone()
        assert torch.equal(gram_update_energy_(first, *factors), gram_update_energy_(second, *factors))
        assert torch.equal(first, second)
        alone = matrix[1].clone()
        gram_update_energy_(alone, *(factor[1] for factor in factors))
        assert torch.equal(alone, first[1])


def test_strides_change_nothing():
    weight = randn(66, 21, dtype=torch.float32)
    storage = torch.full((140, 60), float("nan"))
    storage[1:133:2, 1:43:2] = weight
    expected = energies(weight)
    for view in (weight.T.contiguous().T, storage[1:133:2, 1:43:2]):
        assert torch.equal(energies(view), expected)
    (matrix, *factors), _ = update_inputs(randn(66, 24), 5, torch.float32)
    turned = matrix.T.contiguous().T
    assert torch.equal(gram_update_energy_(turned, *factors), gram_update_energy_(matrix, *factors))
    assert torch.equal(turned, matrix)
    basis = torch.linalg.qr(randn(21, 5)).Q.float()
    assert torch.equal(project(storage[1:133:2, 1:43:2], basis.T.contiguous().T), project(weight, basis))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_huge_and_tiny_rows(dtype):
    for scale in (1e30, 1e-20, 1e-38):
        weight = randn(70, 30).mul_(torch.where(torch.arange(70) % 2 == 0, 1.0, scale)[:, None]).to(dtype)
        for variant in VARIANTS:
            near(energies(weight, 1.0, *variant), oracle.per_neuron(weight, 1.0, *variant), 2e-6)
