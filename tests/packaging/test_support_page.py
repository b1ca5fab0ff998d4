"""The table of docs/support.md is the registry's; tests/kernels/test_support.py asks whether that is true."""

from __future__ import annotations

import sphere_kernels
from benchmarks import support
from sphere_kernels import dispatch


def test_the_page_is_the_registry():
    page = support.PAGE.read_text()
    assert support.render(page) == page
    assert support.render(page.replace("forward, backward", "forward", 1)) == page


def test_every_operation_is_a_function_or_internal():
    functions = {support.NAMES.get(op, op) for op, *_ in dispatch.table() if op not in support.INTERNAL}
    assert functions <= set(sphere_kernels.__all__)
