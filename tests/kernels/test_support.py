"""Each cell of the table of implementations that can run here is true; it is written to docs/support.md."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cases import DTYPES, randn

from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    dispatch,
    gram,
    gram_energy,
    gram_update_energy_,
    hyperspherical_energy,
    principal_directions,
    sparse_projection,
)
from sphere_kernels._products import products_for

CELLS = {(op, impl): (dtypes, backward) for op, impl, dtypes, backward in dispatch.table()}
BASIS = torch.linalg.qr(randn(5, 2, seed=5)).Q


def called(op, impl, x):
    """What an implementation makes of a tensor ``[5, 5]``, which serves as weight, update or Gram matrix."""
    basis, factor = BASIS.to(x.dtype), randn(5, 2, seed=6, dtype=x.dtype)
    if op == "products":
        return products_for(x, impl).matmul(x, x)
    calls = {
        "pair_energy": lambda: hyperspherical_energy(x, impl=impl),
        "gram": lambda: gram(x, impl=impl),
        "gram_energy": lambda: gram_energy(x, impl=impl),
        "gram_update_energy_": lambda: gram_update_energy_(x, factor, factor, factor.mT @ factor, impl=impl),
        "principal_directions": lambda: principal_directions(x, impl=impl).basis,
        "sparse_projection": lambda: sparse_projection(x, basis, impl=impl),
        "apply_projected_update_": lambda: apply_projected_update_(
            x.clone(), LowRankUpdate(factor, factor.mT), basis, impl=impl
        ),
    }
    return calls[op]()


def test_the_table_has_every_operation():
    assert {op for op, _ in CELLS} == set(dispatch.operations()) - {"pair_energy_backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", sorted({op for op, _ in CELLS}))
def test_cells_are_true(op, dtype, each_impl):
    impl, x = each_impl, randn(5, 5, dtype=dtype)
    if op in ("gram_energy", "gram_update_energy_", "products"):
        x = (x @ x.mT).contiguous()
    if (op, impl) not in CELLS:
        with pytest.raises(ValueError, match=f"impl='{impl}' is not available for {op}"):
            called(op, impl, x.to(torch.float32))
        return
    dtypes, backward = CELLS[op, impl]
    if dtype not in dtypes:
        if op != "products":  # which has no checks of its own
            with pytest.raises(TypeError, match="must be float64 or float32, got"):
                called(op, impl, x)
        return
    assert torch.isfinite(called(op, impl, x)).all()
    if backward:
        called(op, impl, x.requires_grad_()).sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    elif op == "pair_energy":
        with pytest.raises(ValueError, match="has no backward pass"):
            called(op, impl, x.requires_grad_())
    elif op != "products":  # which the streaming states call under no_grad
        x = x if op.endswith("_") else x.requires_grad_()
        assert not called(op, impl, x).requires_grad


@pytest.mark.parametrize("op", dispatch.operations())
def test_every_implementation_is_where_the_registry_says(op):
    for impl, implementation in dispatch.operation(op).implementations.items():
        if impl != "triton" or importlib.util.find_spec("triton"):
            assert callable(implementation.run)
