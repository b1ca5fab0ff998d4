"""The energy of a kept Gram matrix: that of an update of rank 0, without a write."""

from __future__ import annotations

import pytest
import torch
from cases import EXPONENTS, VARIANTS, crowded, randn

from sphere_kernels import gram, gram_energy, gram_update_energy_

pytestmark = pytest.mark.usefixtures("each_impl")

WIDE = (torch.float64, torch.float32)


def after_nothing(matrix, *options, **named):
    """The energy after an update of rank 0."""
    none = matrix.new_zeros(*matrix.shape[:-1], 0)
    return gram_update_energy_(matrix.clone(), none, none, none[..., :0, :], *options, **named)


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_bits_of_an_update_of_rank_0(dtype, distance, half_space, small_tiles):
    weight = torch.stack([crowded(), randn(24, 9, seed=3)]).to(dtype)
    matrix = gram(weight)
    for s in EXPONENTS:
        for rows in (None, weight):
            options = {"weight": rows, "distance": distance, "half_space": half_space}
            assert torch.equal(gram_energy(matrix, s, **options), after_nothing(matrix, s, **options))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_across_real_tiles(dtype):
    matrix = gram(randn(300, 50, dtype=dtype))
    assert torch.equal(gram_energy(matrix), after_nothing(matrix))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_it_reads_the_upper_triangle_and_writes_nothing(dtype):
    matrix = gram(randn(2, 40, 7, dtype=dtype))
    expected = gram_energy(matrix)
    half = matrix.triu() + torch.full_like(matrix, float("nan")).tril(-1)
    before, version = half.clone(), half._version
    assert torch.equal(gram_energy(half), expected)
    assert torch.equal(half.nan_to_num(1e9), before.nan_to_num(1e9)) and half._version == version
    # Strided, transposed, and a batch that no view makes one dimension.
    wide = torch.full((2, 80, 120), float("nan"), dtype=dtype)[:, ::2, ::3]
    assert torch.equal(gram_energy(wide.copy_(matrix)), expected)
    assert torch.equal(gram_energy(matrix.mT), expected)
    spread = torch.stack([matrix, matrix], 1).transpose(0, 1)
    assert torch.equal(gram_energy(spread), torch.stack([expected, expected]))


@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (0, 3, 3), (2, 0, 0)])
def test_nothing_to_sum(shape):
    energy = gram_energy(torch.ones(shape))
    assert energy.shape == shape[:-1] and energy.dtype == torch.float64 and not energy.any()


def test_nan_and_infinity_poison_the_neurons_that_meet_them():
    for bad in (float("nan"), float("inf")):
        matrix = gram(randn(5, 4))
        matrix[1, 3] = matrix[3, 1] = bad
        assert gram_energy(matrix).isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gram": torch.ones(3, 4)}, ValueError, r"gram must be square, \[..., n, n\], got shape \[3, 4\]"),
        ({"gram": torch.ones(3, 3).bfloat16()}, TypeError, "gram must be float64 or float32, got torch.bfloat16"),
        ({"weight": torch.ones(4, 2)}, ValueError, r"weight must have shape \[3, 2\] to follow gram \[3, 3\]"),
        ({"weight": torch.ones(3, 2, device="meta")}, ValueError, "weight must be on the device of gram"),
        ({"s": -1}, ValueError, "s must be finite and at least 0"),
        ({"impl": "gpu"}, ValueError, "impl must be one of"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is not available for gram_energy"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        gram_energy(**{"gram": torch.eye(3)} | change)
