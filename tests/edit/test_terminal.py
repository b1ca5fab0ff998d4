"""What is told of progress where there is no terminal."""

from __future__ import annotations

import re

from sphere_edit.cli import terminal
from sphere_edit.cli.terminal import Lines


class _Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _lines():
    clock, said = _Clock(), []
    return clock, said, Lines(said.append, clock)


def _batch_end(lines, batch, edits):
    lines.show("batches", batch, 5)
    lines.show("edits", edits, 500)


def test_a_line_now_and_then():
    """Batches of ten seconds: the third and the sixth end more than 30 seconds after the line before."""
    clock, said, lines = _lines()
    lines.show("batches", 0, 100)
    lines.show("edits", 0, 1000)
    for batch in range(1, 8):
        clock.seconds += 10
        lines.show("batches", batch, 100)
        lines.show("edits", 10 * batch, 1000)
    assert said == [
        "batch 3 of 100, 30 of 1000 edits, 1 edits/s, 16 min left",
        "batch 6 of 100, 60 of 1000 edits, 1 edits/s, 16 min left",
    ]


def test_every_end_of_a_long_batch_and_the_steps_inside():
    clock, said, lines = _lines()
    _batch_end(lines, 0, 0)
    for step in range(1, 11):
        clock.seconds += 5
        lines.show("values", step, 10)
    _batch_end(lines, 1, 100)
    clock.seconds += 20
    lines.show("values", 4, 10)
    clock.seconds += 20
    _batch_end(lines, 2, 200)
    assert said == [
        "batch 0 of 5, 0 of 500 edits; values: 6 of 10, 20 s left",
        "batch 1 of 5, 100 of 500 edits, 2 edits/s, 3 min left",
        "batch 2 of 5, 200 of 500 edits, 2.22 edits/s, 2 min left",
    ]


def test_the_rate_of_a_run_that_goes_on_is_that_of_this_process():
    clock, said, lines = _lines()
    _batch_end(lines, 3, 300)
    clock.seconds = 7200
    _batch_end(lines, 4, 400)
    clock.seconds = 7201
    _batch_end(lines, 5, 500)
    assert said == [
        "batch 4 of 5, 400 of 500 edits, 0.0139 edits/s, 2 h 00 min left",
        "batch 5 of 5, 500 of 500 edits, 0.0278 edits/s, 0 s left",
    ]


def test_steps_outside_the_edits():
    clock, said, lines = _lines()
    lines.show("scores before", 1, 400)
    clock.seconds = 40
    lines.show("scores before", 101, 400)
    assert said == ["scores before: 101 of 400, 2 min left"]


def test_a_file_gets_lines_and_no_bars(capsys):
    with terminal.bars() as show:
        show("batches", 1, 1)
        show("edits", 7, 7)
    assert re.fullmatch(r"batch 1 of 1, 7 of 7 edits\n", capsys.readouterr().err)


def test_a_name_with_colons_is_shown_as_it_is(capsys):
    terminal.complain("method: mine:Key: expected another")
    assert capsys.readouterr().err == "error: method: mine:Key: expected another\n"
