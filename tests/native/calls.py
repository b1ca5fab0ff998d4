"""The operations by the native implementation, and inputs in awkward memory."""

from __future__ import annotations

import functools

import oracle
import torch
from cases import randn

from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    gram,
    gram_energy,
    gram_update_energy_,
    hyperspherical_energy,
)
from sphere_kernels import sparse_projection as project

DIMS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 127, 129)
# Rows around strips of 4 and 8, panels of 2 to 16, micro-tiles of up to 48, tiles of 96 (n <= 1024).
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 48, 49, 95, 96, 97, 191, 192, 193, 289)


def energy(weight, s=1.0, distance="euclidean", half_space=False, impl="native"):
    return hyperspherical_energy(weight, s, reduction="none", distance=distance, half_space=half_space, impl=impl)


def gradient(weight, upstream, s=1.0, distance="euclidean", half_space=False, impl="native"):
    return torch.ops.sphere_kernels.pair_energy_backward(upstream, weight, s, distance, half_space, impl)


@functools.cache
def all_inputs(leading, n, d, dtype):
    """Inputs of every operation; torch's own products, which differ between threads, happen once."""
    weight, wide = randn(*leading, n, d, dtype=dtype), torch.promote_types(dtype, torch.float32)
    basis = torch.linalg.qr(randn(d, max(1, d // 3), seed=2)).Q.to(dtype)
    left, right = randn(*leading, n, 3, dtype=dtype, seed=3), randn(*leading, 3, d, dtype=dtype, seed=4)
    factors = left.to(wide), (weight @ right.mT).to(wide), (right @ right.mT).to(wide)
    return weight, randn(*leading, n, seed=1), basis, LowRankUpdate(left, right), factors


def all_figures(leading=(), n=300, d=33, dtype=torch.float32, impl="native", **options):
    """Every operation once, on inputs that depend on the arguments alone."""
    weight, upstream, basis, update, factors = all_inputs(leading, n, d, dtype)
    matrix = gram(weight, impl=impl)
    figures = [
        matrix.clone(),
        gram(weight, normalize=True, impl=impl),
        gram_update_energy_(matrix, *factors, impl=impl),
        gram_energy(matrix, impl=impl),
    ]
    figures += [matrix, energy(weight, impl=impl, **options), gradient(weight, upstream, impl=impl, **options)]
    figures += [project(weight, basis, impl=impl)]
    for each in (update, weight.flip(-1)):
        figures.append(apply_projected_update_(weight.clone(), each, basis, impl=impl))
    return figures


def updated(matrix, left, cross, inner):
    """The updated Gram matrix written out in fp64."""
    matrix, left, cross, inner = (tensor.double() for tensor in (matrix, left, cross, inner))
    return matrix + cross @ left.mT + left @ cross.mT + left @ inner @ left.mT


def budget(plain, expected, dtype):
    """DESIGN 3: twice what plain torch in the same dtype errs, and a rounding."""
    return 2 * ((plain.double() - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max())


def around(tensor, *gaps):
    """An empty view of the shape of a tensor that steps over ``gap - 1`` elements in each dimension, amid NaN."""
    storage = torch.full([size * gap + 2 for size, gap in zip(tensor.shape, gaps, strict=True)], float("nan"))
    storage = storage.to(tensor.dtype)
    index = [slice(1, 1 + size * gap, gap) for size, gap in zip(tensor.shape, gaps, strict=True)]
    return storage, storage[tuple(index)]


def layouts(tensor):
    """``[batch, rows, cols]`` values in awkward memory with NaN around them: name, storage, view."""
    flat = torch.full((tensor.numel() + 2,), float("nan"), dtype=tensor.dtype)
    made = {
        "off by one element": (flat, flat[1:-1].view(tensor.shape)),
        "padded rows": around(tensor, 1, 1, 1),
        "strided rows and columns": around(tensor, 1, 2, 3),
    }
    for name, order in (("transposed", (0, 2, 1)), ("batch innermost", (1, 2, 0)), ("batch between", (1, 0, 2))):
        storage, view = around(tensor.permute(order), 1, 1, 1)
        made[name] = storage, view.permute([order.index(i) for i in range(3)])
    storage, view = around(tensor, 1, 1, 2)
    made["negative bit"] = storage, torch._neg_view(view)
    for name, (storage, view) in made.items():
        view.copy_(tensor)
        yield name, storage, view


def written_only_inside(storage, view):
    """Whether all memory around a view is still NaN, and none inside it."""
    inside = not view.isnan().any()
    view.fill_(float("nan"))
    return bool(inside and storage.isnan().all())


@functools.cache
def expected_rows(n, d, dtype, s, distance, half_space):
    """A large weight, upstream gradients, and the energies and gradients of rows at the edges of tiles and groups.

    In fp64, for rows so long that the unit rows are of length 1. Many dimensions have no near pairs: inner products do.
    """
    weight, upstream = 1e6 * randn(n, d, dtype=dtype), randn(n, seed=1)
    edges = {0, 1, 47, 48, 95, 96, 191, 192, 287, 288, 1151, 1152, 1535, 1536, 3263, 3264, n // 2, n - 2, n - 1}
    rows = torch.tensor(sorted(edges & set(range(n))))
    others = torch.nn.functional.normalize(weight.double(), dim=-1)
    leaf = weight[rows].double().requires_grad_()
    unit = leaf / leaf.norm(dim=-1, keepdim=True)
    own = torch.zeros(len(rows), n, dtype=torch.bool)
    own[torch.arange(len(rows)), rows] = True
    energies, total = torch.zeros(len(rows), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sign in (1, -1) if half_space else (1,):
        square = (unit[:, None] - sign * others).square().sum(-1) if d < 50 else 2 - 2 * sign * unit @ others.T
        # A row with itself does not count; with its own negative it does, but both of them move.
        square = torch.where(own, 4.0, square)
        t = (0.5 * square.sqrt()).asin() * 2 if distance == "angular" else square.sqrt()
        values = oracle.riesz(t, s)
        energies += values.detach().masked_fill(own & (sign > 0), 0).sum(-1)
        total = total + (values * (upstream[rows, None] + upstream)).masked_fill(own, 0).sum()
    total.backward()
    return weight, upstream, rows, energies, leaf.grad


@functools.cache
def expected_energy(n, d, dtype, s=1.0, distance="euclidean", half_space=False):
    """The oracle's energies and gradients of `randn` rows, and those of plain torch in their dtype."""
    weight, upstream = randn(n, d, dtype=dtype), randn(n, seed=1)
    options = (s, distance, half_space)
    leaf = weight.clone().requires_grad_()
    plain = oracle.plain(leaf, *options)
    (plain * upstream).sum().backward()
    return (
        oracle.per_neuron(weight, *options),
        plain.detach(),
        oracle.gradient(weight, upstream, *options),
        leaf.grad,
    )
