"""Mixed-precision training does not lower the precision of any operation."""

from __future__ import annotations

import torch

from sphere_kernels import gram, gram_update_energy_, hyperspherical_energy, principal_directions, sparse_projection


def test_same_bits_under_autocast():
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def figures() -> tuple[torch.Tensor, ...]:
        energy = hyperspherical_energy(weight)
        (gradient,) = torch.autograd.grad(energy, weight)
        directions = principal_directions(weight.detach())
        matrix = gram(weight)
        (through_gram,) = torch.autograd.grad(matrix.sum(), weight)
        factors = weight.detach()[:, :4], weight.detach()[:, 4:8], weight.detach()[:4, :4]
        updated = gram_update_energy_(matrix, *factors)
        projected = sparse_projection(weight.detach(), directions)
        return energy, gradient, directions.eigenvalues, projected, matrix, through_gram, updated

    plain = figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = figures()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
