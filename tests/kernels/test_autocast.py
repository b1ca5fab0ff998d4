"""Mixed-precision training does not lower the precision of the energy or of the projection."""

from __future__ import annotations

import torch

from sphere_kernels import hyperspherical_energy, principal_directions, sparse_projection


def test_same_bits_under_autocast():
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def figures() -> tuple[torch.Tensor, ...]:
        energy = hyperspherical_energy(weight)
        (gradient,) = torch.autograd.grad(energy, weight)
        directions = principal_directions(weight.detach())
        return energy, gradient, directions.eigenvalues, sparse_projection(weight.detach(), directions)

    plain = figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = figures()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
