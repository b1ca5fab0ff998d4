"""When the native implementation is chosen, what is said when it cannot run, and torch's own checks of it."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from calls import all_figures, energy, gradient
from cases import DTYPES, VARIANTS, crowded, randn, update_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    dispatch,
    env,
    gram,
    gram_update_energy_,
    hyperspherical_energy,
    principal_directions,
    sparse_projection,
)
from sphere_kernels._backends import native

OPERATIONS = (
    "pair_energy",
    "pair_energy_backward",
    "gram",
    "gram_update_energy_",
    "sparse_projection",
    "apply_projected_update_",
)


@pytest.mark.parametrize("op", OPERATIONS)
def test_auto_is_native_on_the_cpu_and_reference_elsewhere(op):
    for dtype in DTYPES:
        assert dispatch.select(op, "auto", "cpu", dtype, (8, 8)) == "native"
        assert dispatch.select(op, "auto", "meta", dtype, (8, 8)) == "reference"


@pytest.mark.parametrize("op", OPERATIONS)
def test_refuses_other_devices(op):
    weight = torch.empty(4, 4, device="meta")
    message = (
        f"impl='native' is not available for {op}: it runs on CPU tensors, not on meta .*available here: .*reference"
    )
    with pytest.raises(ValueError, match=message):
        dispatch.implementation(op, "native", weight)


def test_auto_gives_the_bits_of_native(monkeypatch):
    monkeypatch.delenv(env.KERNELS_IMPL.name, raising=False)
    for first, second in zip(all_figures(impl="auto"), all_figures(impl="native"), strict=True):
        assert torch.equal(first, second)


def test_the_variable_chooses_the_reference(monkeypatch):
    monkeypatch.setenv(env.KERNELS_IMPL.name, "reference")
    monkeypatch.setenv(env.KERNELS_ISA.name, "nothing")  # it is not asked
    for first, second in zip(all_figures(impl="auto"), all_figures(impl="reference"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("isa", ("sse9", "AVX2", "avx512 ", "neon"))
def test_an_instruction_set_that_is_not_there(isa, monkeypatch):
    monkeypatch.setenv(env.KERNELS_ISA.name, isa)
    matrix, basis = torch.eye(4), torch.eye(4)[:, :1]
    nothing = torch.zeros(4, 0)
    for call in (
        lambda: energy(matrix),
        lambda: gradient(matrix, torch.ones(4)),
        lambda: gram(matrix, impl="native"),
        lambda: gram_update_energy_(matrix, nothing, nothing, nothing[:0], impl="native"),
        lambda: sparse_projection(matrix, basis, impl="native"),
        lambda: apply_projected_update_(matrix, torch.ones(4, 4), basis, impl="native"),
    ):
        message = rf"SPHERE_KERNELS_ISA must be auto or one of scalar.* on this machine, got '{isa}'"
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(matrix, torch.eye(4))


def test_auto_is_the_fastest_instruction_set(monkeypatch):
    for value in ("auto", ""):
        monkeypatch.setenv(env.KERNELS_ISA.name, value)
        assert native.instruction_set() == native.USABLE[-1]
    assert native.USABLE[0] == "scalar"
    assert [isa for isa in native.BUILT if isa in native.USABLE] == native.USABLE


def test_the_module_refuses_what_python_would_not_ask():
    weight, out = torch.eye(4), torch.empty(4, 4)
    for tier in (-1, len(native.BUILT), 99):
        with pytest.raises(ValueError, match="this processor cannot run the kernels asked for"):
            native.cpu.gram(native.view(weight[None]), False, tier, 1, out.data_ptr())


def test_without_the_compiled_module():
    code = """
import sys
sys.modules["sphere_kernels._cpu"] = None
import torch, sphere_kernels as k
print(k.hyperspherical_energy(torch.eye(3)).item())
try:
    k.gram(torch.eye(3), impl="native")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    value, message = done.stdout.splitlines()
    assert abs(float(value) - 6 * 2**-0.5) < 1e-6
    assert "impl='native' is not available for gram: the compiled module does not load" in message
    assert "available here: reference" in message


@pytest.mark.parametrize(("distance", "half_space"), VARIANTS)
def test_opcheck_energy(tier, distance, half_space):
    ops = torch.ops.sphere_kernels
    for weight in (crowded(), randn(2, 6, 4, dtype=torch.float32), randn(4, 6, dtype=torch.bfloat16).T):
        leaf = weight.detach().requires_grad_()
        opcheck(ops.pair_energy.default, (leaf, 1.0, distance, half_space, "native"))
        upstream = randn(*weight.shape[:-1])
        # Its derivative is an error by contract.
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        arguments = (upstream, weight, 1.0, distance, half_space, "native")
        opcheck(ops.pair_energy_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_the_rest(tier, dtype):
    ops = torch.ops.sphere_kernels
    basis = torch.linalg.qr(randn(4, 2)).Q.to(dtype)
    for weight in (randn(2, 6, 4, dtype=dtype), randn(4, 6, dtype=dtype).T):
        for normalize in (False, True):
            opcheck(ops.gram.default, (weight.detach().requires_grad_(), normalize, "native"))
        opcheck(ops.sparse_projection.default, (weight.detach().requires_grad_(), basis, 0.5, "native"))
        right = torch.ones(*weight.shape[:-2], 3, 4, dtype=dtype)
        for left, update in ((weight[..., :3].contiguous(), right), (None, weight.clone())):
            opcheck(ops.apply_projected_update_.default, (weight.clone(), left, update, basis, 0.5, "native"))
    wide = torch.promote_types(dtype, torch.float32)
    (matrix, *factors), weight = update_inputs(randn(2, 6, 4), 3, wide)
    for rows in (weight.to(dtype), None):
        opcheck(ops.gram_update_energy_.default, (matrix.clone(), *factors, rows, 1.0, "euclidean", False, "native"))


def in_place(weight, left, right):
    basis = torch.eye(5, dtype=torch.float64)[:, :2]
    state, factors = gram(weight.detach(), impl="native"), (left, weight.detach() @ right.mT, right @ right.mT)
    energies = gram_update_energy_(state, *factors, impl="native")
    written = weight.detach().clone()
    apply_projected_update_(written, LowRankUpdate(left, right), basis, impl="native")
    return state, energies, written


def out_of_place(weight, left, right):
    projected = sparse_projection(weight, torch.eye(5, dtype=torch.float64)[:, :2], impl="native").square().sum()
    cosines = gram(weight, normalize=True, impl="native").pow(3).sum()
    return hyperspherical_energy(weight, impl="native") + projected + cosines


def assert_compiles(step, dynamic, sizes):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in sizes:
        results = []
        for function in (step, compiled):
            weight = randn(n, 5).requires_grad_()
            figures = function(weight, randn(n, 2, seed=1), randn(2, 5, seed=2))
            if step is out_of_place:
                figures.backward()
                figures = figures.detach(), weight.grad
            results.append(figures)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", (in_place, out_of_place))
def test_compile(tier, step):
    assert_compiles(step, False, (7,))


@pytest.mark.parametrize("step", (in_place, out_of_place))
def test_compile_with_changing_sizes(step):
    assert_compiles(step, True, (7, 12))


def test_a_default_device_elsewhere_does_not_matter(tier):
    expected = all_figures()
    weight = randn(300, 33, dtype=torch.float32)
    with torch.device("meta"):
        assert torch.equal(energy(weight), expected[5])
        assert torch.equal(gram(weight, impl="native"), expected[0])
        assert torch.equal(gradient(weight, weight[:, 0].double()), gradient(weight, weight[:, 0].double()))


def test_under_autocast(tier):
    expected = all_figures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op, result in ((lambda w: energy(w), expected[5]), (lambda w: gram(w, impl="native"), expected[0])):
            assert torch.equal(op(randn(300, 33, dtype=torch.float32)), result)


def test_gradients_of_parameters(tier):
    for (distance, half_space), reduction in itertools.product(VARIANTS, ("sum", "mean")):
        weight = torch.nn.Parameter(randn(20, 6))
        options = {"reduction": reduction, "distance": distance, "half_space": half_space}
        for impl in ("reference", "native"):
            hyperspherical_energy(weight, impl=impl, **options).backward()
            if impl == "reference":
                expected, weight.grad = weight.grad, None
        torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_writes_count_as_changes_for_autograd(tier):
    weight = torch.nn.Parameter(randn(4, 5))
    loss = weight.square().sum()
    apply_projected_update_(weight, randn(4, 5), torch.eye(5, dtype=torch.float64)[:, :2], impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_default_device_does_not_reach_the_kernels():
    weight = randn(20, 33, dtype=torch.float32)
    expected = principal_directions(weight, impl="native")
    with torch.device("meta"):
        actual = principal_directions(weight, impl="native")
    assert torch.equal(actual.basis, expected.basis)


def test_a_tensor_without_memory_is_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="tensors with memory, got a FakeTensor"):
        principal_directions(torch.randn(4, 8), impl="native")


def test_a_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("SPHERE_KERNELS_IMPL", "fast")
    with pytest.raises(ValueError, match="SPHERE_KERNELS_IMPL must be one of .*, got 'fast'"):
        hyperspherical_energy(torch.ones(2, 2))
