"""Which implementation of an operation runs: a registry, and one pure function that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """One way to compute an operation."""

    run: Callable[..., Any]
    supports: Supports


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def runs_everywhere(device_type: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The ``supports`` of plain torch code."""
    return None


def register(op: str, impl: str, supports: Supports = runs_everywhere) -> Callable[[Function], Function]:
    """Decorator: make a function the implementation ``impl`` of ``op``."""
    if impl not in NAMED:
        raise ValueError(f"impl must be one of {', '.join(NAMED)}, got {impl!r}")

    def add(run: Function) -> Function:
        _REGISTRY.setdefault(op, {})[impl] = Implementation(run, supports)
        return run

    return add


def operations() -> tuple[str, ...]:
    """Names of the operations that have an implementation."""
    return tuple(sorted(_REGISTRY))


def refusal(op: str, impl: str, device_type: str, dtype: torch.dtype, shape: Iterable[int]) -> str | None:
    """Why ``impl`` cannot run ``op`` on such a tensor; None when it can."""
    implementations = _implementations(op)
    if impl not in implementations:
        return "this build has no such implementation"
    return implementations[impl].supports(device_type, dtype, tuple(shape))


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
    return outside_autocast(_REGISTRY[op][chosen].run, device_type)


def outside_autocast(run: Function, device_type: str) -> Function:
    """A function that runs outside any autocast; entering a context costs microseconds, so only where there is one."""
    return torch.autocast(device_type, enabled=False)(run) if torch.is_autocast_enabled(device_type) else run


def _implementations(op: str) -> dict[str, Implementation]:
    if op not in _REGISTRY:
        raise ValueError(f"op must be one of {', '.join(operations())}, got {op!r}")
    return _REGISTRY[op]
