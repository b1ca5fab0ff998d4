"""Every kernel at sizes off every block edge, against fp64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import DTYPES, VARIANTS, crowded, randn, update_inputs

from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    gram,
    gram_update_energy_,
    hyperspherical_energy,
    sparse_projection,
)
from sphere_kernels._products import products_for

SIZES = [(1, 1), (15, 16), (16, 17), (17, 15), (31, 1), (33, 33)]
LOOSE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def energies(weight, s=1.0, distance="euclidean", half_space=False):
    return hyperspherical_energy(weight, s, reduction="none", distance=distance, half_space=half_space)


def gradient(weight, upstream, s=1.0, distance="euclidean", half_space=False):
    return torch.ops.sphere_kernels.pair_energy_backward(upstream, weight, s, distance, half_space, "auto")


def near(actual, expected, tolerance):
    """Row by row, relative to the row."""
    error = (actual.double() - expected).norm(dim=-1) if actual.ndim > 1 else (actual.double() - expected).abs()
    size = expected.norm(dim=-1) if actual.ndim > 1 else expected.abs()
    assert (error <= tolerance * (size + 1e-3)).all(), (error / (size + 1e-3)).max()


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_energy_and_gradient(n, d, dtype, tiny):
    weight = randn(n, d, dtype=dtype)
    if d == 1:
        weight *= 1e-8  # unit rows of different lengths, not all coincident
    upstream = randn(n, seed=2)
    for s, variant in ((1.0, ("euclidean", False)), (1.5, ("angular", True))):
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if d < 7 else 3e-6
        near(energies(weight, s, *variant), oracle.per_neuron(weight, s, *variant), tolerance)
        near(gradient(weight, upstream, s, *variant), oracle.gradient(weight, upstream, s, *variant), 10 * tolerance)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_coincident_rows_across_tiles_and_groups(dtype, distance, half_space, tiny):
    order = torch.randperm(35, generator=torch.Generator().manual_seed(1))
    weight = torch.cat([crowded(), randn(11, 9, seed=3)])[order].to(dtype)
    upstream = randn(35, seed=2)
    for s in (1.0, 0.0) if dtype == torch.float32 else (2.0,):
        options = (s, distance, half_space)
        near(energies(weight, *options), oracle.per_neuron(weight, *options), 1e-4 if dtype == torch.float32 else 1e-9)
        # As in the reference's tests: the angle between duplicates has no direction but rounding.
        loose = 1e-5 if dtype == torch.float32 or distance == "angular" else 1e-11
        near(gradient(weight, upstream, *options), oracle.gradient(weight, upstream, *options), loose)


def test_many_small_matrices_are_each_as_if_alone(tiny):
    for dtype in (torch.float32, torch.bfloat16):
        weight = randn(3, 2, 19, 11, dtype=dtype)
        weight[2, 1, 4] = weight[2, 1, 18]
        upstream = randn(3, 2, 19, seed=2)
        together, slopes, product = energies(weight), gradient(weight, upstream), gram(weight)
        for i, j in itertools.product(range(3), range(2)):
            assert torch.equal(together[i, j], energies(weight[i, j]))
            assert torch.equal(slopes[i, j], gradient(weight[i, j], upstream[i, j]))
            assert torch.equal(product[i, j], gram(weight[i, j]))


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(n, d, dtype, tiny):
    weight = randn(2, n, d, dtype=dtype)
    for normalize in (False, True):
        rows = oracle.unit_rows(weight.double()) if normalize else weight.double()
        actual = gram(weight, normalize=normalize)
        assert torch.equal(actual, actual.mT)
        error = (actual - rows @ rows.mT).abs().max()
        assert error <= (1e-14 if dtype == torch.float64 else 4e-6) * (rows.square().sum(-1).max() + 1)


@pytest.mark.parametrize(("n", "b"), [(1, 1), (17, 0), (15, 8), (33, 9)])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_gram_update(n, b, dtype, tiny):
    (matrix, left, cross, inner), weight = update_inputs(randn(2, n, 24), b, dtype)
    wide = [t.double() for t in (matrix, left, cross, inner)]
    expected = wide[0] + wide[2] @ wide[1].mT + wide[1] @ wide[2].mT + wide[1] @ wide[3] @ wide[1].mT
    for variant in (("euclidean", False), ("angular", True)):
        updated = matrix.clone().mul_(torch.ones(n, n).triu()).to(dtype)  # nothing is read below the diagonal
        energy = gram_update_energy_(updated, left, cross, inner, distance=variant[0], half_space=variant[1])
        assert torch.equal(updated, updated.mT)
        assert (updated - expected).abs().max() <= 40 * torch.finfo(dtype).eps * expected.abs().max()
        near(energy, oracle.per_neuron(weight, 1.0, *variant), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("n", "b", "d", "r"), [(1, 1, 1, 1), (15, 16, 17, 2), (16, 17, 15, 15), (33, 3, 40, 17)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection(n, b, d, r, dtype, tiny):
    basis = torch.linalg.qr(randn(d, r, seed=5)).Q
    left, right, weight = (randn(*shape, dtype=dtype, seed=k) for k, shape in enumerate(((n, b), (b, d), (n, d))))
    for directions in (basis.float(), basis.to(dtype)) if dtype != torch.float64 else (basis,):
        exact = torch.eye(d, dtype=torch.float64) - 0.7 * directions.double() @ directions.double().T
        near(sparse_projection(right, directions, 0.7), right.double() @ exact, LOOSE[dtype])
        for update, dense in ((LowRankUpdate(left, right), left.double() @ right.double()), (weight, weight.double())):
            target = weight.T.contiguous().T.clone(memory_format=torch.preserve_format)
            apply_projected_update_(target, update, directions, 0.7)
            near(target, weight.double() + dense @ exact, LOOSE[dtype])


def test_one_rounding_at_the_end():
    """A 16-bit result is within half of its last place, and what fp32 adds to that, of the fp64 one."""
    for dtype in (torch.bfloat16, torch.float16):
        update, basis = randn(40, 30, dtype=dtype), torch.linalg.qr(randn(30, 7, seed=5)).Q.float()
        weight = randn(40, 30, dtype=dtype, seed=9)
        exact = update.double() - 0.3 * (update.double() @ basis.double()) @ basis.double().T
        for actual, expected in (
            (sparse_projection(update, basis, 0.3), exact),
            (apply_projected_update_(weight.clone(), update, basis, 0.3), weight.double() + exact),
        ):
            place = torch.finfo(dtype).eps * 2.0 ** expected.abs().log2().floor()
            assert ((actual.double() - expected).abs() <= 0.5 * place + 2e-6).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_products(dtype, tiny):
    products = products_for(torch.zeros(1, 1, dtype=dtype), "triton")
    a, b, c = (
        randn(2, 17, 33, dtype=dtype),
        randn(2, 33, 20, dtype=dtype, seed=1),
        randn(2, 17, 20, dtype=dtype, seed=2),
    )
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(products.matmul(a, b).double(), a.double() @ b.double(), rtol=0, atol=tolerance * 30)
    torch.testing.assert_close(products.gram(b.mT).double(), b.double().mT @ b.double(), rtol=0, atol=tolerance * 30)
    out = c.clone().mT.contiguous().mT
    products.add_(out, a, b)
    torch.testing.assert_close(out.double(), c.double() + a.double() @ b.double(), rtol=0, atol=tolerance * 30)
    square = products.gram(c)
    expected = square.double() - a.double() @ a.double().mT
    products.subtract_gram_(square, a)
    assert torch.equal(square, square.mT)
    torch.testing.assert_close(square.double(), expected, rtol=0, atol=tolerance * 30)


@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.bfloat16)])
def test_not_finite_gives_nan(bad, dtype, tiny):
    weight = torch.cat([crowded()[6:18], randn(10, 9)]).to(dtype).repeat(2, 1, 1)
    weight[1, 20, 2] = bad
    for variant in (("euclidean", False), ("angular", True)):
        found = energies(weight, 1.0, *variant)
        assert found[1].isnan().all()
        assert torch.equal(found[0], energies(weight[0], 1.0, *variant))
        slopes = gradient(weight, torch.ones(2, 22), 1.0, *variant)[1]
        assert slopes[weight[1].abs().sum(-1) != 0].isnan().all()
        assert energies(weight[1, 20:21], 1.0, *variant).isnan().all()


def test_an_entry_that_is_not_finite_spoils_its_rows_only(tiny):
    for i, j in ((3, 40), (4, 5), (6, 6)):
        (matrix, *factors), weight = update_inputs(randn(45, 24), 3, torch.float32)
        weight[21] = weight[20]  # a near pair in the same tiles
        matrix[20:22] = weight[20].float() @ weight.float().T
        matrix[i, j] = float("nan")
        energy = gram_update_energy_(matrix, *(0 * factor for factor in factors), weight=weight)
        assert energy.isnan().nonzero().flatten().tolist() == ([i, j] if i < j else list(range(45)))


def test_strides_and_repetition(tiny):
    weight = randn(34, 21, dtype=torch.float32)
    storage = torch.full((70, 60), float("nan"))
    storage[1:69:2, 1:43:2] = weight
    expected, slopes = energies(weight), gradient(weight, torch.ones(34))
    for view in (weight, weight.T.contiguous().T, storage[1:69:2, 1:43:2]):
        assert torch.equal(energies(view), expected)
        assert torch.equal(gradient(view, torch.ones(()).expand(34)), slopes)
        assert torch.equal(gram(view), gram(weight))


def test_huge_and_tiny_rows(tiny):
    for dtype, scale in itertools.product((torch.float32, torch.bfloat16), (1e30, 1e-20, 1e-38)):
        weight = randn(20, 30).mul_(torch.where(torch.arange(20) % 2 == 0, 1.0, scale)[:, None]).to(dtype)
        for variant in VARIANTS:
            near(energies(weight, 1.0, *variant), oracle.per_neuron(weight, 1.0, *variant), 2e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 3, 5), (2, 0, 5), (2, 3, 0), (1, 4)])
def test_empty(shape):
    weight = torch.randn(shape)
    expected = hyperspherical_energy(weight, reduction="none", impl="reference")
    torch.testing.assert_close(energies(weight), expected)
    assert gradient(weight, torch.ones(shape[:-1])).shape == weight.shape
    torch.testing.assert_close(gram(weight), gram(weight, impl="reference"))
    nothing = weight.new_zeros(*shape[:-1], 0)
    matrix = gram(weight)
    gram_update_energy_(matrix, nothing, nothing, weight.new_zeros(*shape[:-2], 0, 0), weight=weight)
    assert torch.equal(sparse_projection(weight, weight.new_zeros(shape[-1], 0)), weight)
