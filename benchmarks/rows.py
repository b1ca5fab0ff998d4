"""Stored rows of the kernel suites, read for tables and plots."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """One way on one shape, with all turns together.

    Attributes:
        seconds: median over turns of the medians over rounds; per batch if a call computes several.
        limit: seconds for the useful flops and bytes at the rates of ``torch.mm`` (2048³) and of a copy.
        memory: extra MB, if measured.
    """

    way: str
    kind: str
    seconds: float
    limit: float
    flops: float
    error: float | None
    memory: float | None


@dataclass(frozen=True)
class Comparison:
    """All ways of one case on one shape."""

    shape: Shape
    timings: tuple[Timing, ...]

    def named(self, way: str) -> Timing | None:
        return next((t for t in self.timings if t.way == way), None)

    def best(self, *kinds: str) -> Timing | None:
        """The fastest way of the given kinds."""
        return min((t for t in self.timings if t.kind in kinds), key=lambda t: t.seconds, default=None)

    @property
    def ours(self) -> Timing:
        return next(t for t in self.timings if t.kind == "ours")

    @property
    def share(self) -> float:
        """Our useful rate over the measured limit: ``torch.mm`` of the same shape, else the machine's rates."""
        product = self.named("torch.mm")
        n, d = self.shape
        limit = self.ours.flops / (2 * n * n * d / product.seconds) if product else self.ours.limit
        return limit / self.ours.seconds

    def ratio(self, *kinds: str) -> float | None:
        """Our speed-up over the fastest way of the given kinds."""
        other = self.best(*kinds)
        return other.seconds / self.ours.seconds if other else None


def comparisons(stored: dict[str, Any], case: str) -> list[Comparison]:
    """One `Comparison` for each shape of a case, in the order measured."""
    found: dict[Shape, dict[str, list[dict[str, Any]]]] = {}
    for row in stored["benchmarks"]:
        info = row["extra_info"]
        if info.get("case") == case:
            found.setdefault(tuple(info["shape"]), {}).setdefault(info["way"], []).append(row)
    return [Comparison(shape, tuple(_timing(turns) for turns in ways.values())) for shape, ways in found.items()]


def _timing(turns: list[dict[str, Any]]) -> Timing:
    infos = [turn["extra_info"] for turn in turns]
    limits = [max(i["flops"] / i["gemm_gflops"], i["bytes"] / i["copy_gbs"]) / 1e9 for i in infos]
    return Timing(
        way=infos[0]["way"],
        kind=infos[0]["kind"],
        seconds=median(turn["stats"]["median"] for turn in turns) / infos[0].get("batches", 1),
        limit=limits[0],
        flops=infos[0]["flops"],
        error=infos[0]["error"],
        memory=infos[0].get("memory_mb"),
    )
