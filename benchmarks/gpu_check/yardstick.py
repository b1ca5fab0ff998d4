"""The yardstick of a result: fp64, with an error budget from plain PyTorch in the same arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.cases import Row, Wrong
from benchmarks.gpu_check.device import ROOT, HostNumbers, Target, environment
from sphere_kernels import dispatch
from sphere_kernels._backends import gpu

sys.path.insert(0, str(ROOT / "tests/kernels"))  # the oracle and the inputs of the kernel tests

import cases as inputs  # isort: skip

HALF = (torch.bfloat16, torch.float16)
Result = Tensor | tuple[Tensor, ...]
Variant = tuple[float, str, bool]
PLAIN: Variant = (1.0, "euclidean", False)
FEW: tuple[Variant, ...] = (PLAIN, (0.0, "angular", True), (2.0, "euclidean", True))
ALL: tuple[Variant, ...] = tuple((s, *variant) for s in (0.0, 1.0, 2.0) for variant in inputs.VARIANTS)


@dataclass(frozen=True)
class Kind:
    """An implementation with operands of one dtype; ``dot`` is the way to multiply fp32 operands.

    Attributes:
        plain: the kernels' way to multiply, for plain PyTorch beside them. 16-bit operands are exact in fp32; tensor
            cores truncate their sums as those of tf32x3.
    """

    impl: str
    dtype: torch.dtype
    dot: str
    plain: str

    @property
    def computed(self) -> torch.dtype:
        """Dtype of products and of sums of products."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def eps(self) -> float:
        """Rounding unit of products; tf32 has 11 bits."""
        return 2.0**-10 if self.dot == "tf32" else eps_of(self.computed)

    @property
    def product_eps(self) -> float:
        """Rounding unit of products, wider in fp64, where plain torch is the reference without an error."""
        return self.eps * (5 if self.dtype == torch.float64 else 1)

    def info(self, op: str, case: str) -> Row:
        return {"op": op, "impl": self.impl, "dtype": str(self.dtype)[6:], "dot": self.dot, "case": case}


def precisions(device: Target) -> tuple[str, ...]:
    """Values of ``SPHERE_KERNELS_DOT`` that the device supports."""

    def has(dot: str) -> bool:
        with environment("SPHERE_KERNELS_DOT", dot):
            try:
                return gpu.precision(gpu.architecture(device.torch)) == dot
            except ValueError:
                return False

    return tuple(dot for dot in gpu.PRECISIONS if has(dot))


def kinds(device: Target, op: str, impl: str, wide: bool = False) -> Iterator[Kind]:
    """The kinds that an implementation offers for an operation; with ``wide``, without 16-bit kinds."""
    dots = precisions(device)
    cores = "tf32x3" if "tf32x3" in dots else "ieee"
    found = [Kind(impl, torch.float64, "", "ieee"), *(Kind(impl, torch.float32, dot, dot) for dot in dots)]
    found += [] if wide else [Kind(impl, dtype, "", cores) for dtype in HALF]
    if device.rehearsed:  # the other kinds take the same code
        found = [kind for kind in found if kind.dot != "ieee" and kind.dtype != torch.float16]
    for kind in found:
        if dispatch.refusal(op, impl, device.torch.type, kind.dtype, (1024, 1024)) is None:
            yield kind


def first_kind(device: Target, op: str, impl: str) -> Kind | None:
    """The default kind of fp32, if the implementation offers one."""
    default = gpu.precision(gpu.architecture(device.torch))
    return next((kind for kind in kinds(device, op, impl) if kind.dot == default), None)


def under(kind: Kind, run: Callable[[], Row]) -> Callable[[], Row]:
    """Wrap a case to run in the kind's arithmetic, with new memory filled with NaN."""

    def case() -> Row:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with environment("SPHERE_KERNELS_DOT", kind.dot or "auto"):
                return run()
        finally:
            torch.use_deterministic_algorithms(False)

    return case


def randn(device: Target, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return inputs.randn(*shape, dtype=dtype, seed=seed).to(device.torch)


def twice(device: Target, run: Callable[[], Result], host: int | None = 0) -> tuple[Tensor, ...]:
    """The result of a call; a second call must give the same bits and copy at most ``host`` numbers to the host.

    Give ``host=None`` if the call uses torch's own solvers, which wait for the device themselves.
    """
    first = _tuple(run())
    with HostNumbers() as seen, device.without_copies_to_the_host() if host == 0 else nullcontext():
        second = _tuple(run())
    if host is not None and seen.count > host:
        raise Wrong(f"{seen.count} numbers came to the host, at most {host} may", {})
    if not all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)):
        raise Wrong("two runs on the same input differ", {})
    return first


def within(actual: Result, expected: Result, plain: Result, *eps: float) -> Row:
    """The error and the budget ``2 (error of plain torch + eps max|expected|)``, for the worst of several tensors.

    Give one ``eps`` for all tensors, or one for each.
    """
    worst: Row = {"error": 0.0, "budget": float("inf"), "plain_error": 0.0}
    tensors = _tuple(actual), _tuple(expected), _tuple(plain)
    epsilons = eps * len(tensors[0]) if len(eps) == 1 else eps
    for a, e, p, own in zip(*tensors, epsilons, strict=True):
        if not e.numel():
            continue
        error = _largest(a.double() - e)
        off = _largest(p.double() - e)
        size = _largest(e)
        budget = 2 * (off + own * size)
        if not error <= budget:
            figures = {"error": error, "budget": budget, "plain_error": off, "largest": size}
            raise Wrong(f"error {error:.2e} exceeds its budget {budget:.2e} (values up to {size:.2e})", figures)
        if error * worst["budget"] >= worst["error"] * budget or worst["budget"] == float("inf"):
            worst = {"error": error, "budget": budget, "plain_error": off}
    return worst


def row_by_row(actual: Tensor, expected: Tensor, tolerance: float) -> Row:
    """The largest relative error of a row: near pairs make some rows many orders of magnitude larger than others."""
    error, size = (actual.double() - expected).abs(), expected.abs()
    if actual.ndim > 1 and actual.shape[-1] > 1:
        error, size = error.norm(dim=-1), size.norm(dim=-1)
    worst = _largest(error / (size + 1e-3))
    if not worst <= tolerance:
        raise Wrong(f"a row is off by {worst:.2e} of its size, {tolerance:.0e} allowed", {"error": worst})
    return {"error": worst, "budget": tolerance}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that NaN equals itself under `torch.equal`."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()])


def title(variant: Variant) -> str:
    s, distance, half_space = variant
    return f"{s:g} {distance}{' half' * half_space}"


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


Judge = Callable[[Target, Kind, Tensor, Variant], Row]


def at_edges(device: Target, kind: Kind, judge: Judge) -> Row:
    """The worst judgement over sizes off every block edge; several small matrices, lest chance set the budget."""
    worst: Row = {"error": 0.0, "budget": 1.0}
    for n, d in device.sizes.edges:
        # With one feature, unit rows have different lengths and do not all coincide.
        shape = (device.sizes.copies, n, d) if n * d < 2000 else (n, d)
        weight = randn(device, *shape).mul_(1e-8 if d == 1 and kind.dtype not in HALF else 1).to(kind.dtype)
        try:
            found = judge(device, kind, weight, PLAIN)
        except Wrong as wrong:
            raise Wrong(f"{n} x {d}: {wrong.args[0]}", wrong.args[1]) from None
        if found["error"] * worst["budget"] > worst["error"] * found["budget"]:
            worst = found | {"shape": [n, d]}
    return worst


def layouts(device: Target, kind: Kind, compute: Callable[[Tensor, str], Tensor]) -> Row:
    """Check bit for bit: each matrix of a batch against the matrix alone, and every memory layout."""
    n, d = device.sizes.usual
    weight = randn(device, 3, 2, n, d, dtype=kind.dtype)
    together = twice(device, lambda: compute(weight, kind.impl))[0]
    for i, j in ((0, 0), (2, 1)):
        if not torch.equal(together[i, j], compute(weight[i, j], kind.impl)):
            raise Wrong(f"matrix {i, j} of a batch differs from the same matrix alone", {})
    storage = weight.new_full((2 * n, 2 * d), float("nan"))
    storage[1::2, 1::2] = weight[0, 0]
    views = {"transposed": weight[0, 0].T.contiguous().T, "strided": storage[1::2, 1::2]}
    for name, view in views.items():
        if not torch.equal(together[0, 0], compute(view, kind.impl)):
            raise Wrong(f"a {name} weight gives other bits than a contiguous one", {})
    return {"shape": list(weight.shape)}
