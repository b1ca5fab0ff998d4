"""What contradicts, what is asked twice, and what becomes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sphere_edit.data import load_requests
from sphere_edit.data.requests import (
    EditRequest,
    RequestError,
    batches,
    check_batches,
    conflicts,
    duplicates,
    settle_conflicts,
)


def facts(*named: str) -> list[EditRequest]:
    """``"a1"`` asks a and wants 1."""
    return [EditRequest("{} is", name[0], name[1], id=f"{i}:{name}") for i, name in enumerate(named)]


def ids(requests: list[EditRequest]) -> list[str]:
    return [request.id.partition(":")[2] for request in requests]


def test_all_contradictions_are_named() -> None:
    requests = facts("a1", "a2", "a3", "b1", "A1", "b2", "c1", "c1")
    found = [(c.batch, c.first.id, c.later.id) for c in conflicts(requests, 4)]
    assert found == [(0, "0:a1", "1:a2"), (0, "0:a1", "2:a3")]
    message = r"^2 contradictions: batch 0 \(batch size 4\): .*'0:a1' and '1:a2' .*'0:a1' and '2:a3' contradict[^;]*$"
    with pytest.raises(RequestError, match=message):
        check_batches(requests, 4)
    check_batches(requests, 1)
    with pytest.raises(RequestError, match=r"^3 contradictions: .*'3:b1' and '5:b2'"):
        settle_conflicts(requests, 8)


def test_more_than_twenty_are_counted() -> None:
    requests = [EditRequest("{} is", "a", str(i), id=f"<{i}>") for i in range(24)]
    with pytest.raises(RequestError, match=r"^23 contradictions: .*'<20>' contradict.*; and 3 more$") as caught:
        check_batches(requests, 24)
    assert "'<21>'" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "size", "kept"),
    [
        (["a1", "a2", "b1", "b2"], 4, ["a1", "b1"]),
        (["a1", "b1", "a2"], 2, ["a1", "b1", "a2"]),  # in the next batch it is an edit of the edit
        (["a1", "a2", "a3", "b1", "a4"], 2, ["a1", "b1", "a4"]),
        (["a1", "a2", "b1", "b2", "c1", "b3"], 3, ["a1", "b1", "c1", "b3"]),
        (["a1", "a2", "b1", "b2", "c1", "d1", "d2"], 2, ["a1", "b1", "b2", "c1", "d1"]),  # moving up, d2 meets d1
        (["a1", "a2", "b1", "c1", "c2", "d1"], 3, ["a1", "b1", "c1", "c2", "d1"]),
        (["a1", "A1", "a1"], 3, ["a1", "A1", "a1"]),
    ],
)
def test_the_later_one_is_left_out_and_the_others_move_up(named: list[str], size: int, kept: list[str]) -> None:
    said: list[str] = []
    found = settle_conflicts(facts(*named), size, "skip", said.append)
    assert ids(found) == kept
    check_batches(found, size)
    assert len(said) == (len(kept) < len(named))
    if said:
        assert said[0].startswith(f"{len(named) - len(kept)} of {len(named)} requests contradict")
        assert all(repr(request.id) in said[0] for request in facts(*named) if request not in found)
    assert settle_conflicts(found, size, "skip", said.append) == found  # as a run that goes on reads its own


def test_unknown_ways() -> None:
    with pytest.raises(RequestError, match="on_conflict: expected one of refuse, skip, got 'split'"):
        settle_conflicts(facts("a1"), 1, "split")


def test_duplicates_are_those_of_prompt_and_target() -> None:
    found = duplicates(facts("a1", "b1", "A1", "a2", "a1"))
    assert [(first.id, later.id) for first, later in found] == [("0:a1", "2:A1"), ("0:a1", "4:a1")]


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("is", "is"),
        ("is ", "is"),
        ("is\n", "is\n"),
        ("is  ", "is  "),
        ("is\n ", "is\n "),
        ("is\t", "is\t"),
        ("\nis", "\nis"),
    ],
)
def test_whitespace_at_the_end_of_a_prompt_belongs_to_it(written: str, stored: str) -> None:
    more = ("paraphrases", "neighborhood", "generation")
    request = EditRequest(f"{{}} {written}", " a ", " b\n", target_true="c ", **{name: (written,) for name in more})
    assert request.prompt == f"{{}} {stored}" and request.text == f"a {stored}"
    assert {getattr(request, name) for name in more} == {(stored,)}
    assert (request.target_new, request.target_true) == ("b", "c")
    assert EditRequest.from_dict(vars(request)) == request


def test_counterfact_in_file_order_loses_few() -> None:
    path = Path(os.environ.get("SPHERE_EDIT_DATA", "")) / "counterfact_all.jsonl.gz"
    if not path.is_file():
        pytest.skip("SPHERE_EDIT_DATA names no folder with CounterFact")
    said: list[str] = []
    requests = load_requests(path, on_note=said.append)
    found = settle_conflicts(requests, 100, "skip", said.append)
    assert 0 < len(requests) - len(found) < 10 and "contradict an earlier one" in said[-1]
    assert all(not conflicts(batch, 100) for batch in batches(found, 100))
