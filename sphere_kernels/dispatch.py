"""Which implementation of an operation runs: a registry, and one pure function that decides."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sphere_kernels import env

IMPLS = ("auto", "reference", "native", "triton", "cuda")
PREFERENCE = ("triton", "native", "reference")  # the order in which "auto" asks
NAMED = (*PREFERENCE, "cuda")  # what can be asked for by name; cuda in no other way

# Why an implementation cannot take tensors of this device type, dtype and shape; None when it can.
Supports = Callable[[str, torch.dtype, tuple[int, ...]], "str | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        place: the function, ``"module:name"``; the module is imported at the first call.
        supports: see `Supports`.
    """

    place: str
    supports: Supports

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        module, _, name = self.place.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


@dataclass(frozen=True)
class Operation:
    """An operation and the ways to compute it.

    Attributes:
        implementations: by name, each one of `NAMED`.
        dtypes: those that its leading tensor may have.
        derivative: the operation that computes its gradient, `PLAIN` where torch does for every implementation; None:
            it is not differentiable.
        missing: why an implementation does not exist, by its name, where there is more to say than that.
    """

    implementations: dict[str, Implementation]
    dtypes: tuple[torch.dtype, ...]
    derivative: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


PLAIN = "torch"
_REGISTRY: dict[str, Operation] = {}


def register(name: str, operation: Operation) -> None:
    """Add an operation; those of this package stand in `sphere_kernels._backends.operations`."""
    for impl in operation.implementations:
        if impl not in NAMED:
            raise ValueError(f"impl must be one of {', '.join(NAMED)}, got {impl!r}")
    _REGISTRY[name] = operation


def operation(op: str) -> Operation:
    """The operation of this name; raises ValueError for an unknown one."""
    if op not in _REGISTRY:
        raise ValueError(f"op must be one of {', '.join(operations())}, got {op!r}")
    return _REGISTRY[op]


def operations() -> tuple[str, ...]:
    """Names of the operations that have an implementation."""
    return tuple(sorted(_REGISTRY))


def has_backward(op: str, impl: str) -> bool:
    """Whether a gradient flows through an implementation of an operation."""
    derivative = operation(op).derivative
    return derivative == PLAIN or (derivative is not None and impl in operation(derivative).implementations)


def table() -> list[tuple[str, str, tuple[torch.dtype, ...], bool]]:
    """All implementations, as rows of operation, implementation, dtypes of the leading tensor, and `has_backward`.

    An operation that only serves as another's derivative has no rows: it is that one's backward pass.
    """
    derivatives = {other.derivative for name, other in _REGISTRY.items() if other.derivative != name}
    return [
        (op, impl, _REGISTRY[op].dtypes, has_backward(op, impl))
        for op in operations()
        if op not in derivatives
        for impl in IMPLS[1:]
        if impl in _REGISTRY[op].implementations
    ]


def refusal(op: str, impl: str, device_type: str, dtype: torch.dtype, shape: Iterable[int]) -> str | None:
    """Why ``impl`` cannot run ``op`` on such a tensor; None when it can."""
    known = operation(op)
    if impl not in known.implementations:
        return known.missing.get(impl, "this build has no such implementation")
    return known.implementations[impl].supports(device_type, dtype, tuple(shape))


def available(op: str, device_type: str, dtype: torch.dtype, shape: Iterable[int]) -> tuple[str, ...]:
    """The implementations that can run ``op`` on such a tensor: in the order of "auto", then what it never takes."""
    shape = tuple(shape)
    return tuple(impl for impl in NAMED if refusal(op, impl, device_type, dtype, shape) is None)


def select(op: str, impl: str, device_type: str, dtype: torch.dtype, shape: Iterable[int]) -> str:
    """Name the implementation of ``op`` that runs for ``impl`` on such a tensor; depends on nothing else.

    Args:
        op: operation name, one of `operations()`.
        impl: ``"auto"`` (the first of `PREFERENCE` that can run) or one implementation by name.
        device_type, dtype, shape: of the operation's leading tensor.

    Returns:
        An entry of `NAMED`.

    Raises:
        ValueError: unknown ``op`` or ``impl``, or the implementation named cannot run; it never falls back.
    """
    shape = tuple(shape)
    if impl == "auto":
        for choice in PREFERENCE:
            if refusal(op, choice, device_type, dtype, shape) is None:
                return choice
        reason: str | None = "no implementation can run"
    elif impl in NAMED:
        reason = refusal(op, impl, device_type, dtype, shape)
        if reason is None:
            return impl
    else:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    choices = available(op, device_type, dtype, shape)
    raise ValueError(
        f"impl={impl!r} is not available for {op}: {reason} "
        f"({device_type}, {dtype}, shape {list(shape)}); available here: {', '.join(choices) or 'none'}"
    )


def implementation(op: str, impl: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes ``op`` on ``tensor``; ``impl="auto"`` yields to ``SPHERE_KERNELS_IMPL``.

    It runs outside any autocast: the dtypes are the operation's own.
    """
    requested = env.kernels_impl() if impl == "auto" else impl
    if requested not in IMPLS and impl == "auto":
        raise ValueError(f"SPHERE_KERNELS_IMPL must be one of {', '.join(IMPLS)}, got {requested!r}")
    device_type = tensor.device.type
    chosen = select(op, requested, device_type, tensor.dtype, tensor.shape)
    return outside_autocast(_REGISTRY[op].implementations[chosen].run, device_type)


def outside_autocast(run: Function, device_type: str) -> Function:
    """A function that runs outside any autocast; entering a context costs microseconds, so only where there is one."""
    return torch.autocast(device_type, enabled=False)(run) if torch.is_autocast_enabled(device_type) else run
