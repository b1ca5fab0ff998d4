"""Run in a process of its own: every tensor ends at a page that kills, or is too large for 32 bits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "kernels"))

from guards import far_apart, guarded, poisoned  # noqa: E402


def guard_what_is_made() -> None:
    """All memory that the launches ask for, filled with NaN, and their schedules."""
    from sphere_kernels._backends.triton import schedule

    empty, zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros
    torch.Tensor.new_empty = lambda self, *a, **k: guarded(poisoned(empty(self, *a, **k)))
    torch.Tensor.new_zeros = lambda self, *a, **k: guarded(zeros(self, *a, **k))
    order = schedule.in_bands
    schedule.in_bands = lambda *a: guarded(order(*a))


def run_all() -> None:
    """Every kernel, at sizes that no block divides, with near pairs; results are compared with the reference's."""
    import sphere_kernels as k
    from sphere_kernels.energy import triton as energy

    energy.GROUP = 64
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: guarded(torch.randn(*shape, generator=generator))  # noqa: E731
    weight = randn(71, 37)
    weight[70] = weight[3] * 2 + 1e-3 * weight[4]
    ops = torch.ops.sphere_kernels
    upstream = randn(71).double()
    for s, distance, half_space in ((1.0, "euclidean", False), (1.5, "angular", True)):
        for op, arguments in ((ops.pair_energy, (weight,)), (ops.pair_energy_backward, (guarded(upstream), weight))):
            actual, expected = (op(*arguments, s, distance, half_space, impl) for impl in ("triton", "reference"))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    left, cross, inner = randn(71, 5), randn(71, 5), torch.eye(5)
    for impl in ("triton", "reference"):
        matrix = guarded(k.gram(weight, impl=impl))
        found = k.gram_update_energy_(matrix, left, cross, guarded(inner), weight=weight, impl=impl)
        results = (matrix, found) if impl == "triton" else results + (matrix, found)  # noqa: F821
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1], results[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k.gram_energy(results[0], weight=weight, impl="triton"), results[1], rtol=0, atol=0)
    torch.testing.assert_close(k.gram(weight, normalize=True, impl="triton"), k.gram(weight, normalize=True))
    update, basis = k.LowRankUpdate(randn(71, 5), randn(5, 37)), guarded(torch.linalg.qr(randn(37, 6)).Q)
    targets = [k.apply_projected_update_(guarded(weight), update, basis, impl=i) for i in ("triton", "reference")]
    torch.testing.assert_close(*targets, rtol=1e-4, atol=1e-4)


def run_far_apart() -> None:
    """Kernels on matrices that reach past 2^31 elements."""
    import sphere_kernels as k

    stride = 1 << 27
    weight = far_apart(20, 12, stride)
    weight.copy_(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)))
    weight[19] = weight[2]
    near = weight.clone(memory_format=torch.contiguous_format)
    ops, upstream = torch.ops.sphere_kernels, torch.arange(20.0).double()
    for op, before in ((ops.pair_energy, ()), (ops.pair_energy_backward, (upstream,))):
        actual = op(*before, weight, 1.0, "euclidean", False, "triton")
        torch.testing.assert_close(actual, op(*before, near, 1.0, "euclidean", False, "reference"))
    matrix = far_apart(20, 20, stride)
    matrix.copy_(k.gram(near))
    nothing = torch.zeros(20, 0)
    energy = k.gram_update_energy_(matrix, nothing, nothing, nothing[:0], weight=weight, impl="triton")
    torch.testing.assert_close(energy, k.hyperspherical_energy(near, reduction="none"))
    assert torch.equal(k.gram_energy(matrix, weight=weight, impl="triton"), energy)
    update, basis = torch.ones(20, 12), torch.eye(12)[:, :3].contiguous()
    k.apply_projected_update_(weight, update, basis, impl="triton")
    torch.testing.assert_close(weight.contiguous(), k.apply_projected_update_(near, update, basis, impl="reference"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "guarded":
        import sphere_kernels.energy.triton  # noqa: F401

        guard_what_is_made()
        run_all()
    else:
        run_far_apart()
    print("done")
