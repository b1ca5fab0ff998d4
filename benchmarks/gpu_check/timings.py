"""The timings: operations at the shapes of real layers, beside plain PyTorch, eager and compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import directions as plain_directions
from benchmarks.baselines import energy as plain_energy
from benchmarks.baselines import gram as plain_gram
from benchmarks.baselines import projection as plain_projection
from benchmarks.gpu_check.cases import Case, Row, Skipped, Wrong
from benchmarks.gpu_check.clock import clocked, rates
from benchmarks.gpu_check.device import IMPLS, REAL, Target, environment
from benchmarks.gpu_check.plain import batched, batched_formula, half_gram, in_tf32, product
from benchmarks.gpu_check.yardstick import precisions
from sphere_kernels import (
    LowRankUpdate,
    apply_projected_update_,
    dispatch,
    gram,
    gram_update_energy_,
    hyperspherical_energy,
    principal_directions,
)

ALPHA, RATIO = 0.5, 0.5
Shape = tuple[int, ...]
Ways = list[tuple[str, str, Callable[..., Any]]]  # name, arithmetic of fp32 products, the way


@dataclass(frozen=True)
class Timed:
    """One operation.

    Attributes:
        op: name in the dispatch of the operation to time.
        arguments: arguments for a shape and a dtype; made anew for each call if ``fresh``.
        ours: takes the arguments and ``impl``.
        plain: the ways of plain PyTorch, for a shape and a dtype.
        error: relative error of a result.
        tolerance: largest error of ours, by precision (``""``: 16-bit operands).
        flops, bytes: least work and least traffic of the operation.
    """

    name: str
    op: str
    dtypes: tuple[torch.dtype, ...]
    arguments: Callable[[Target, Shape, torch.dtype], tuple[Any, ...]]
    ours: Callable[..., Any]
    plain: Callable[[Shape, torch.dtype], Ways]
    error: Callable[[Any, Target, Shape, torch.dtype], float]
    tolerance: dict[str, float]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape, int], float]
    fresh: bool = False


def timings(device: Target) -> Iterator[Case]:
    """The machine's rates, then every operation, shape, dtype and way."""
    yield from rates(device)
    for timed in (ENERGY, GRADIENT, SMALL, GRAM, UPDATE, PROJECTION, DIRECTIONS):
        for shape in [device.sizes.small] if timed is SMALL else device.sizes.shapes:
            for dtype in timed.dtypes:
                yield from _ways(device, timed, shape, dtype)


def _ways(device: Target, timed: Timed, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    info = {"case": timed.name, "shape": list(shape), "dtype": str(dtype)[6:]}
    for impl in IMPLS:
        if dispatch.refusal(timed.op, impl, device.torch.type, dtype, shape) is None:
            for dot in precisions(device) if dtype == torch.float32 else ("",):
                run = partial(_measure_ours, device, timed, shape, dtype, impl, dot)
                yield Case(info | {"way": impl, "kind": "ours", "dot": dot}, run)
    for name, dot, way in timed.plain(shape, dtype):
        kind = "compile" if name == "torch.compile" else "plain"
        run = partial(_measure_plain, device, timed, shape, dtype, in_tf32(way) if dot == "tf32" else way)
        yield Case(info | {"way": name, "kind": kind, "dot": dot}, run)


def _measure_ours(device: Target, timed: Timed, shape: Shape, dtype: torch.dtype, impl: str, dot: str) -> Row:
    with environment("SPHERE_KERNELS_DOT", dot or "auto"):
        return _measure(device, timed, shape, dtype, partial(timed.ours, impl=impl), timed.tolerance[dot])


def _measure_plain(device: Target, timed: Timed, shape: Shape, dtype: torch.dtype, way: Callable[..., Any]) -> Row:
    try:
        return _measure(device, timed, shape, dtype, way, None)
    except Exception as error:  # a failure of plain PyTorch is no fault of ours
        raise Skipped(f"{type(error).__name__}: {error}"[:200]) from None
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compile each shape separately, without a limit


def _measure(
    device: Target, timed: Timed, shape: Shape, dtype: torch.dtype, way: Callable[..., Any], tolerance: float | None
) -> Row:
    """Check the result against fp64, then time the way."""
    kept = timed.arguments(device, shape, dtype)

    def arguments() -> tuple[Any, ...]:
        return tuple(t.clone() for t in kept) if timed.fresh else kept

    error = timed.error(way(*arguments()), device, shape, dtype)
    if tolerance is not None and not error <= tolerance:
        raise Wrong(f"error {error:.1e} exceeds {tolerance:.0e}; not timed", {"error": error})
    given = arguments()
    memory = device.peak(lambda: way(*given))
    figures = clocked(device, way, arguments)
    work = {"flops": timed.flops(shape), "bytes": timed.bytes(shape, dtype.itemsize)}
    return figures | work | {"error": float(f"{error:.2g}"), "memory_mb": memory}


@lru_cache(maxsize=1)
def _weight(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _rows(device: Target, shape: Shape, dtype: torch.dtype) -> tuple[Tensor]:
    return (_weight(device.torch, shape, dtype),)


@lru_cache(maxsize=1)
def _exact_energy(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    weight = _weight(device, shape, dtype).double()
    return batched(weight) if len(shape) > 2 else plain_energy.exact(weight)


@lru_cache(maxsize=1)
def _exact_gradient(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    return plain_energy.gradient_triangle(_weight(device, shape, dtype).double())


@lru_cache(maxsize=1)
def _exact_gram(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    weight = _weight(device, shape, dtype).double()
    return weight @ weight.T


def _energy_error(found: Tensor, device: Target, shape: Shape, dtype: torch.dtype) -> float:
    return float((found / _exact_energy(device.torch, shape, dtype) - 1).abs().max())


def _norm_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _gradient_error(found: Tensor, device: Target, shape: Shape, dtype: torch.dtype) -> float:
    return _norm_error(found, _exact_gradient(device.torch, shape, dtype))


def _gram_error(found: Tensor, device: Target, shape: Shape, dtype: torch.dtype) -> float:
    wanted = _exact_gram(device.torch, shape, dtype)
    return float((found.double() - wanted).abs().max() / wanted.max())


def _half_or(ways: Ways, dtype: torch.dtype, half: Ways) -> Ways:
    """Ways of fp32 in both precisions; or, for 16-bit weights, ``half`` and fp32 ways on widened weights in tf32, which
    holds them exactly."""
    if dtype == torch.float32:
        return [(name, dot, way) for name, _, way in ways for dot in ("ieee", "tf32")]
    widened = [(f"{name} of fp32", "tf32", lambda w, way=way: way(w.float())) for name, _, way in ways]
    compiled = [("torch.compile", dot, way) for name, dot, way in widened if name.startswith("torch.compile")]
    return [*half, *(way for way in widened if not way[0].startswith("torch.compile")), *compiled]


def _energy_ways(shape: Shape, dtype: torch.dtype) -> Ways:
    ways = [
        ("X @ X.T, in place", "", plain_energy.gram_in_place),
        ("chunked triangle", "", plain_energy.chunked_triangle),
        ("torch.compile", "", plain_energy.compiled),
    ]
    return _half_or(ways, dtype, [("16-bit W @ W.T, in place", "", half_gram)])


def _gradient_ways(shape: Shape, dtype: torch.dtype) -> Ways:
    ways = [
        ("analytic, in place", "", plain_energy.gradient_function),
        ("chunked triangle", "", plain_energy.gradient_triangle),
        ("torch.compile", "", plain_energy.gradient_compiled),
    ]
    return _half_or(ways, dtype, [])


def _small_ways(shape: Shape, dtype: torch.dtype) -> Ways:
    compiled = lambda w: plain_energy.compile_once(batched_formula)(w)  # noqa: E731
    return _half_or([("bmm, in place", "", batched), ("torch.compile", "", compiled)], dtype, [])


def _gram_ways(shape: Shape, dtype: torch.dtype) -> Ways:
    half = [("16-bit W @ W.T", "", lambda w: torch.mm(w, w.T, out_dtype=torch.float32))]
    return _half_or([("X @ X.T", "", lambda w: w @ w.T)], dtype, half)


def _gradient(weight: Tensor, impl: str) -> Tensor:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(hyperspherical_energy(leaf, impl=impl), leaf)[0]


BOTH = (torch.float32, torch.bfloat16)
ENERGY = Timed(
    "energy",
    "pair_energy",
    BOTH,
    _rows,
    hyperspherical_energy,
    _energy_ways,
    _energy_error,
    {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 1e-4, "": 1e-6},
    lambda shape: shape[0] ** 2 * shape[1],
    lambda shape, size: size * shape[0] * shape[1],
)
GRADIENT = Timed(
    "energy with gradient",
    "pair_energy_backward",
    BOTH,
    _rows,
    _gradient,
    _gradient_ways,
    _gradient_error,
    {"ieee": 1e-5, "tf32x3": 1e-4, "tf32": 5e-3, "": 5e-3},
    lambda shape: 3 * shape[0] ** 2 * shape[1],
    lambda shape, size: 2 * size * shape[0] * shape[1],
)
SMALL = Timed(
    "energy of many small",
    "pair_energy",
    BOTH,
    _rows,
    hyperspherical_energy,
    _small_ways,
    _energy_error,
    {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3, "": 1e-5},
    lambda shape: shape[0] * shape[1] ** 2 * shape[2],
    lambda shape, size: size * shape[0] * shape[1] * shape[2],
)
GRAM = Timed(
    "gram",
    "gram",
    BOTH,
    _rows,
    gram,
    _gram_ways,
    _gram_error,
    {"ieee": 1e-5, "tf32x3": 1e-3, "tf32": 5e-3, "": 1e-3},
    lambda shape: shape[0] ** 2 * shape[1],
    lambda shape, size: size * shape[0] * shape[1] + 4 * shape[0] ** 2,
)


@lru_cache(maxsize=1)
def _update_given(device: Target, shape: Shape) -> tuple[Tensor, ...]:
    n, d = shape
    weight = _weight(device.torch, shape, torch.float32)
    generator = torch.Generator(device.torch).manual_seed(1)
    left, right = (
        torch.randn(*size, generator=generator, device=device.torch)
        for size in ((n, device.sizes.edits), (device.sizes.edits, d))
    )
    left /= device.sizes.edits
    return product(weight, weight.T, "ieee"), left, product(weight, right.T, "ieee"), product(right, right.T, "ieee")


def _update(matrix: Tensor, left: Tensor, cross: Tensor, inner: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return matrix, gram_update_energy_(matrix, left, cross, inner, impl=impl)


@lru_cache(maxsize=1)
def _exact_update(device: Target, shape: Shape) -> tuple[Tensor, Tensor]:
    return plain_gram.exact(*_update_given(device, shape))


def _update_error(found: tuple[Tensor, Tensor], device: Target, shape: Shape, dtype: torch.dtype) -> float:
    (matrix, energies), (wanted, wanted_energies) = found, _exact_update(device, shape)
    off = (matrix - wanted).abs().max() / wanted.max()
    return float(torch.maximum(off, (energies / wanted_energies - 1).abs().max()))


UPDATE = Timed(
    "gram update with energy",
    "gram_update_energy_",
    (torch.float32,),
    lambda device, shape, dtype: _update_given(device, shape),
    _update,
    lambda shape, dtype: _half_or(
        [
            ("addmm, kept buffer", "", plain_gram.addmm),
            ("addmm, chunked", "", plain_gram.chunked),
            ("torch.compile", "", plain_gram.compiled),
        ],
        dtype,
        [],
    ),
    _update_error,
    {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3},
    lambda shape: 2 * shape[0] ** 2 * REAL.edits,
    lambda shape, size: 2 * size * shape[0] ** 2,
    fresh=True,
)


@lru_cache(maxsize=1)
def _projection_given(device: Target, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weight, left and right factor, and a basis of n / 4 directions: about as many hold half of the energy."""
    n, d = shape
    generator = torch.Generator(device.torch).manual_seed(2)
    left, right, span = (
        torch.randn(*size, generator=generator, device=device.torch)
        for size in ((n, device.sizes.edits), (device.sizes.edits, d), (d, max(1, n // 4)))
    )
    return _weight(device.torch, shape, dtype), left / device.sizes.edits, right, torch.linalg.qr(span)[0]


def _apply(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor, impl: str) -> Tensor:
    return apply_projected_update_(weight, LowRankUpdate(left, right), basis, ALPHA, impl=impl)


def _thin(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return plain_projection.thin(weight, left, right, basis, ALPHA)
    return weight.add_(left @ plain_projection.factor(right, basis, ALPHA))


@lru_cache(maxsize=1)
def _exact_projection(device: Target, shape: Shape, dtype: torch.dtype) -> Tensor:
    return plain_projection.exact(*_projection_given(device, shape, dtype), ALPHA)


def _projection_error(found: Tensor, device: Target, shape: Shape, dtype: torch.dtype) -> float:
    """Error of the new weight, relative to the weight's norm."""
    return _norm_error(found, _exact_projection(device, shape, dtype))


def _compiled_thin(weight: Tensor, left: Tensor, right: Tensor, basis: Tensor) -> Tensor:
    return plain_energy.compile_once(_thin)(weight, left, right, basis)  # type: ignore[arg-type, call-arg]


PROJECTION = Timed(
    "projection",
    "apply_projected_update_",
    BOTH,
    _projection_given,
    _apply,
    lambda shape, dtype: [
        (name, dot, way)
        for name, way in (("thin factor", _thin), ("torch.compile", _compiled_thin))
        for dot in ("ieee", "tf32")
    ],
    _projection_error,
    {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3, "": 5e-3},
    lambda shape: 2 * REAL.edits * shape[1] * (shape[0] + 2 * (shape[0] // 4)),
    lambda shape, size: 2 * size * shape[0] * shape[1] + 4 * shape[1] * (shape[0] // 4),
    fresh=True,
)


@lru_cache(maxsize=1)
def _spectrum(device: torch.device, shape: Shape, dtype: torch.dtype) -> Tensor:
    return plain_directions.exact_spectrum(_weight(device, shape, dtype))


def _directions_error(basis: Tensor, device: Target, shape: Shape, dtype: torch.dtype) -> float:
    """Error of a basis: share of energy missed against the best basis of this size, or distance from orthonormal."""
    values, r = _spectrum(device.torch, shape, dtype), basis.shape[1]
    if abs(r - plain_directions.rank(values, RATIO)) > 1:
        raise Wrong(f"rank {r}, expected {plain_directions.rank(values, RATIO)}", {})
    basis, unit = basis.double(), plain_energy.unit_rows(_weight(device.torch, shape, dtype).double())
    missed = 1 - (unit @ basis).square().sum() / values[:r].sum()
    skew = (basis.T @ basis - torch.eye(r, device=basis.device)).abs().max()
    return float(torch.maximum(missed.abs(), skew))


DIRECTIONS = Timed(
    "directions",
    "principal_directions",
    (torch.float32,),
    _rows,
    lambda weight, impl: principal_directions(weight, RATIO, impl=impl).basis,
    lambda shape, dtype: [
        ("eigh, small side", dot, partial(plain_directions.small_side, energy_ratio=RATIO)) for dot in ("ieee", "tf32")
    ],
    _directions_error,
    {"ieee": 1e-4, "tf32x3": 1e-3, "tf32": 1e-2},
    lambda shape: shape[0] ** 2 * shape[1],
    lambda shape, size: size * shape[0] * shape[1],
)
