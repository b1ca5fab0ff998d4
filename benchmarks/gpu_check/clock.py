"""The clock, and the machine's own rates by this clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu_check.cases import Case, Row
from benchmarks.gpu_check.device import Target
from benchmarks.gpu_check.plain import tensor_cores
from benchmarks.gpu_check.yardstick import precisions


def clocked(device: Target, way: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]) -> Row:
    """Median seconds over many calls, between events around each; the arguments are ready, but not in L2.

    ``host`` is the time until the call returns, a lower bound for short calls.
    """
    for _ in range(device.sizes.warm_up):
        way(*arguments())
    device.synchronize()
    times: list[float] = []
    host: list[float] = []
    began = perf_counter()
    sizes = device.sizes
    while len(times) < sizes.fewest or (len(times) < sizes.most and perf_counter() - began < sizes.seconds):
        given = arguments()
        start, end = device.event(), device.event()
        device.flush()
        start.record()
        called = perf_counter()
        way(*given)
        host.append(perf_counter() - called)
        end.record()
        device.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return {
        "seconds": median(times),
        "fastest": min(times),
        "slowest": max(times),
        "repeats": len(times),
        "host": median(host),
    }


def rates(device: Target) -> Iterator[Case]:
    """The device's rate of products in each precision and bandwidth of a copy, by the same clock."""
    kinds = [(torch.float64, ""), *((torch.float32, dot) for dot in precisions(device) if dot != "tf32x3")]
    for dtype, dot in [*kinds, (torch.bfloat16, ""), (torch.float16, "")]:
        info = {"case": "rate", "dtype": str(dtype)[6:], "way": "torch.mm", "kind": "limit", "dot": dot}
        yield Case(info, partial(_product_rate, device, dtype, dot))
    yield Case({"case": "rate", "dtype": "", "way": "copy", "kind": "limit", "dot": ""}, partial(_copy_rate, device))


def _product_rate(device: Target, dtype: torch.dtype, dot: str) -> Row:
    side = device.sizes.product
    a = torch.randn(side, side, device=device.torch).to(dtype)
    with tensor_cores(dot == "tf32"):
        found = clocked(device, torch.mm, lambda: (a, a))
    return found | {"flops": 2.0 * side**3, "tflops": 2 * side**3 / found["seconds"] / 1e12}


def _copy_rate(device: Target) -> Row:
    a = torch.ones(device.sizes.copy // 4, device=device.torch)
    b = torch.empty_like(a)
    found = clocked(device, lambda: b.copy_(a), tuple)
    return found | {"bytes": 2.0 * a.nbytes, "gbs": 2 * a.nbytes / found["seconds"] / 1e9}
