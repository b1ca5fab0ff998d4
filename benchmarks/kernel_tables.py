"""Tables of the kernel suites: our time, the fastest plain way by name, the ratio, the limit, memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.rows import Comparison, Shape, Timing, comparisons

Stored = dict[str, Any]

# Required ratios on two cores, against the fastest plain way that forms all pairs, or the published way.
FLOORS: dict[str, dict[Shape, float]] = {
    "energy": {(2048, 1024): 1.9, (4096, 1024): 1.9, (4096, 4096): 1.9, (2048, 256): 4, (8192, 64): 4},
    "energy with gradient": {(2048, 1024): 1.8},
    "gram update with energy": {(4096, 100): 2},
    "directions": {(576, 1536): 12, (1024, 3584): 30, (2048, 7168): 40},
    "projection": {(1024, 3584): 20, (2048, 7168): 20},
    "streaming, refreshed every batch": {(576, 1536): 12, (1024, 3584): 30, (2048, 7168): 45},
    "streaming, refreshed every 10 batches": {(576, 1536): 20, (1024, 3584): 60, (2048, 7168): 100},
}
OVERHEAD = 30  # microseconds, at most
REST = ["plain, MB", "ours, MB", "our error"]


def table(head: list[str], rows: list[list[str]], after_first: str = "---:") -> str:
    """A Markdown table; ``after_first`` is the rule of all columns but the first, left-aligned one."""
    rule = ["---"] + [after_first] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def filled(page: str, write: Callable[[str], str], kind: str = "table") -> str:
    """``page`` with ``write(NAME)`` filled in between every ``<!-- kind NAME -->`` and ``<!-- end -->``."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {kind} {match[1]} -->\n{write(match[1])}\n<!-- end -->"

    return re.sub(rf"<!-- {kind} ([a-z0-9_-]+) -->.*?<!-- end -->", fill, page, flags=re.S)


def energy(stored: Stored) -> str:
    return _pairs(stored, "energy")


def gradient(stored: Stored) -> str:
    return _pairs(stored, "energy with gradient")


def _pairs(stored: Stored, case: str) -> str:
    """Ours against plain ways that form all pairs, at once or in chunks, and against half of the pairs in chunks."""
    head = ["n × d", "plain, ms", "ours, ms", "ratio", "floor", "plain, half of the pairs, ms", "ratio", "of mm rate"]
    rows = []
    for c in comparisons(stored, case):
        cells = [_shape(c), _best(c, "plain"), _ms(c.ours), _ratio(c, "plain"), _floor(case, c)]
        rows.append([*cells, _ms(c.best("triangle")), _ratio(c, "triangle"), _share(c), *_rest(c, "plain")])
    return table([*head, *REST], rows)


def backends(stored: Stored) -> str:
    """Milliseconds of every implementation of ours and of other libraries, if more than one was measured."""
    found = [c for c in comparisons(stored, "energy") if c.best("backend", "peer")]
    names = list(dict.fromkeys(t.way for c in found for t in c.timings if t.kind in ("ours", "backend", "peer")))
    return table(["n × d", *names], [[_shape(c), *(_ms(c.named(name)) for name in names)] for c in found])


def gram(stored: Stored) -> str:
    return _limited(stored, "gram", "n × d")


def gram_update(stored: Stored) -> str:
    return _limited(stored, "gram update with energy", "n × b")


def _limited(stored: Stored, case: str, size: str) -> str:
    rows = []
    for c in comparisons(stored, case):
        cells = [_shape(c), _best(c, "plain"), _ms(c.ours), _ratio(c, "plain"), _floor(case, c), _share(c)]
        rows.append([*cells, *_rest(c, "plain")])
    return table([size, "plain, ms", "ours, ms", "ratio", "floor", "of mm or copy rate", *REST], rows)


def projection_alone(stored: Stored) -> str:
    return _limited(stored, "projection alone", "n × d")


def directions(stored: Stored) -> str:
    head = ["n × d", "published, ms", "ours, ms", "ratio", "floor", "plain, ms", "ratio", "eigh alone, ms"]
    rows = []
    for c in comparisons(stored, "directions"):
        cells = [*_published(c, "directions"), _ms(c.best("limit"))]
        rows.append([*cells, _mb(c.best("published")), *_rest(c, "plain")])
    return table([*head, "published, MB", *REST], rows)


def projection(stored: Stored) -> str:
    head = ["n × d", "published, ms", "ours, ms", "ratio", "floor", "plain, ms", "ratio", "of mm or copy rate"]
    rows = []
    for c in comparisons(stored, "projection"):
        cells = [*_published(c, "projection"), _share(c)]
        rows.append([*cells, _mb(c.best("published")), *_rest(c, "plain")])
    return table([*head, "published, MB", *REST], rows)


def streaming(stored: Stored) -> str:
    """Times of a batch; the last column of times is ours with second keys for the history."""
    return _streaming(stored, "streaming, refreshed every batch", ["second keys, ms"])


def streaming_seldom(stored: Stored) -> str:
    return _streaming(stored, "streaming, refreshed every 10 batches", [])


def _streaming(stored: Stored, case: str, more: list[str]) -> str:
    head = ["n × d", "published, ms", "ours, ms", "ratio", "floor", "plain, ms", "ratio", *more]
    rows = []
    for c in comparisons(stored, case):
        cells = [*_published(c, case), *(_ms(c.best("backend")) for _ in more), _mb(c.best("published"))]
        rows.append([*cells, *_rest(c, "plain")])
    return table([*head, "published, MB", *REST], rows)


def _published(c: Comparison, case: str) -> list[str]:
    cells = [_shape(c), _ms(c.best("published")), _ms(c.ours), _ratio(c, "published"), _floor(case, c)]
    return [*cells, _best(c, "plain"), _ratio(c, "plain")]


def overhead(stored: Stored) -> str:
    """Microseconds of a call on eight neurons."""
    cases = dict.fromkeys(row["extra_info"]["case"] for row in stored["benchmarks"])
    rows = []
    for case in cases:
        (c,) = comparisons(stored, case)
        plain = c.best("plain", "triangle")
        cells = [f"{1e6 * t.seconds:.1f}" if t else "–" for t in (c.ours, plain)]
        rows.append([case, c.ours.way, cells[0], f"≤ {OVERHEAD}", f"{cells[1]} ({plain.way})" if plain else "–"])
    return table(["n = 8", "implementation", "ours, µs", "to reach", "plain, µs"], rows)


def _shape(c: Comparison) -> str:
    return " × ".join(map(str, c.shape))


def _ms(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    ms = 1e3 * timing.seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _best(c: Comparison, kind: str) -> str:
    """The time and the name of the fastest way of a kind."""
    timing = c.best(kind)
    return f"{_ms(timing)} ({timing.way})" if timing else "–"


def _share(c: Comparison) -> str:
    return f"{100 * c.share:.0f} %"


def _ratio(c: Comparison, kind: str) -> str:
    ratio = c.ratio(kind)
    return f"{ratio:.1f}×" if ratio else "–"


def _floor(case: str, c: Comparison) -> str:
    floor = FLOORS.get(case, {}).get(c.shape)
    return f"{floor:g}×" if floor else ""


def _mb(timing: Timing | None) -> str:
    return "–" if timing is None or timing.memory is None else f"{timing.memory:.0f}"


def _rest(c: Comparison, kind: str) -> list[str]:
    """Extra memory of the fastest way of a kind and of ours, and our error: the columns `REST`."""
    return [_mb(c.best(kind)), _mb(c.ours), f"{c.ours.error:.0e}"]
