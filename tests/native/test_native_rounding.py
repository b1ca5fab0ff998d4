"""Reading and writing 16-bit floats: every value there is, and every halfway between two of them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from sphere_kernels import apply_projected_update_

LOW = (torch.bfloat16, torch.float16)


def added_to(weight, update):
    """``weight + update``, rounded once to the dtype of ``weight``: a basis of no directions suppresses nothing."""
    basis = torch.zeros(update.shape[-1], 0, dtype=update.dtype)
    return apply_projected_update_(weight, update, basis, impl="native")


@functools.cache
def every_value(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(256, 256)


@functools.cache
def grid(dtype):
    """The values from 0 up, and where the next one after the largest would be, in fp64."""
    steps = torch.arange(0, 1 << 15).to(torch.int16).view(dtype).double()
    finite = steps[steps.isfinite()]
    return torch.cat([finite, 2 * finite[-1:] - finite[-2:-1]]).numpy()


def nearest(values, dtype):
    """Correct rounding, ties to the even neighbour, by search in the grid."""
    points = grid(dtype)
    size = np.minimum(np.abs(values), points[-1])
    above = np.clip(np.searchsorted(points, size), 1, len(points) - 1)
    low, high = points[above - 1], points[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    rounded = np.where(up, high, low)
    rounded = np.where(rounded == points[-1], np.inf, rounded)
    return torch.from_numpy(np.copysign(np.where(np.isnan(values), np.nan, rounded), values))


def hard_values(dtype, wide):
    """All values, all halfway points, their neighbours in the wide type, and what lies outside the range."""
    points = grid(dtype)
    middle = (points[1:] + points[:-1]) / 2
    kind = np.float64 if wide == torch.float64 else np.float32
    middle, points = middle.astype(kind), points[points <= np.finfo(kind).max].astype(kind)
    up, down = kind(np.inf), kind(0)
    special = [0.0, 1e-45, 1e-30, 65504, 65519.99, 65520, 65536, 1e30, 3.3e38, 3.4e38, np.inf, np.nan]
    special += [5e-324, 1e-300, 3.5e38, 1e300] if kind == np.float64 else []
    parts = [points, middle, np.nextafter(middle, up), np.nextafter(middle, down), np.array(special, dtype=kind)]
    values = np.concatenate(parts)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("wide", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_rounding(tier, dtype, wide):
    values = hard_values(dtype, wide)
    expected = nearest(values.astype(np.float64), dtype)
    update = torch.from_numpy(values)
    # One row, one column (strided), and a length that vectors do not divide.
    for shape in ((1, -1), (-1, 1)):
        actual = added_to(torch.zeros(update.view(shape).shape, dtype=dtype), update.view(shape)).flatten().double()
        wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
        assert not wrong.any(), (values[wrong][:5], actual[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("wide", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_value_is_read_as_it_is(tier, dtype, wide):
    values = every_value(dtype)
    for update in (values, values.T):
        actual = added_to(torch.zeros(256, 256, dtype=wide), update)
        torch.testing.assert_close(actual, update.to(wide), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_adding_nothing_changes_no_value(tier, dtype):
    values = every_value(dtype)
    for wide in (torch.float32, torch.float64, dtype):
        actual = added_to(values.clone(), torch.zeros(256, 256, dtype=wide))
        torch.testing.assert_close(actual, values, rtol=0, atol=0, equal_nan=True)


def test_fp64_rounds_to_fp32_once(tier):
    values = torch.from_numpy(
        np.array([1 + 2**-24, 1 + 2**-24 + 2**-50, 1 + 3 * 2**-24, 1e39, 1e-45, 7e-46, -1e-320, np.nan])
    )
    actual = added_to(torch.zeros(1, 8), values[None])
    torch.testing.assert_close(actual[0], values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_sum_is_rounded_not_its_parts(tier, dtype):
    # 1 + eps / 2 is a tie that goes to 1; a hair more goes up, unless it is lost on the way.
    eps = torch.finfo(dtype).eps
    update = torch.tensor([[eps / 2, eps / 2 * (1 + 2**-10), 1.5 * eps, 1.5 * eps * (1 - 2**-10)]], dtype=torch.float32)
    actual = added_to(torch.ones(1, 4, dtype=dtype), update)
    assert actual[0].tolist() == [1, 1 + eps, 1 + 2 * eps, 1 + eps]
