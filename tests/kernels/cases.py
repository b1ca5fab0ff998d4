"""Inputs that the kernel tests share."""

from __future__ import annotations

import itertools

import torch

VARIANTS = list(itertools.product(("euclidean", "angular"), (False, True)))
EXPONENTS = (0.0, 0.5, 1.0, 2.0, 3.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def crowded(d=9):
    """Duplicates, antipodes, near duplicates at t = 1e-2, 1e-4 and 1e-8, a zero row, rows of very different length."""
    weight = randn(24, d)
    offsets = torch.nn.functional.normalize(randn(24, d, seed=1), dim=-1)
    unit = torch.nn.functional.normalize(weight, dim=-1)
    weight[3], weight[20] = weight[1], 2 * weight[1]
    weight[5], weight[21] = -weight[2], -3 * weight[2]
    for row, t in ((8, 1e-2), (9, 1e-4), (10, 1e-8)):
        weight[row] = unit[7] + t * offsets[row]
        weight[row + 5] = -unit[7] + t * offsets[row + 5]
    weight[17] = 0
    weight[18] *= 1e3
    weight[19] *= 1e-3
    return weight


def update_inputs(weight, b, dtype=torch.float64, seed=7):
    """The Gram matrix of a weight, the factors of an update ``R X`` and the updated weight, fp64 but for ``dtype``."""
    *leading, n, d = weight.shape
    left, right = 0.3 * randn(*leading, n, b, seed=seed), 0.3 * randn(*leading, b, d, seed=seed + 1)
    tensors = (weight @ weight.mT, left, weight @ right.mT, right @ right.mT)
    return [tensor.to(dtype) for tensor in tensors], weight + left @ right


def update_to_crowded(dtype):
    """A weight, the factors of an update in ``dtype``, and the `crowded` weight that it leads to."""
    after = crowded().to(dtype).double()
    left = 0.3 * randn(24, 2, seed=7) * after.norm(dim=-1, keepdim=True)  # nothing for the zero row
    right = 0.3 * randn(2, 9, seed=8)
    before = after - left @ right
    return before, (left.to(dtype), (before @ right.mT).to(dtype), (right @ right.mT).to(dtype)), after
