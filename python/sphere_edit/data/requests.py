"""Edit requests: one fact to change, and the prompts that test the change."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

ON_CONFLICT = ("refuse", "skip")


class RequestError(ValueError):
    """A request that cannot be edited; the message names the request and the problem."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to edit.

    Args:
        prompt: template with exactly one ``{}`` for the subject, e.g. ``"The capital of {} is"``. The target follows
            after one blank, or directly where the prompt ends in whitespace, such as the newline of a chat template. A
            single blank at the prompt's end is that blank and is not stored. All this holds for the prompts below too.
        subject: the subject of the fact.
        target_new: the continuation that the model shall give after the edit. Stored without surrounding blanks.
        target_true: the true continuation, before the edit; needed for *success* and for specificity.
        paraphrases: complete prompts that ask for the same fact in other words (generalization).
        neighborhood: complete prompts about *other* subjects (specificity).
        relation: name of the relation, for grouping.
        id: name of the request in outputs; any short string.
        neighborhood_answers: the right answer to each prompt of the neighbourhood; if empty, ``target_true`` for all.
        generation: complete prompts for free text about the subject; if empty, the prompt itself.
        portability: complete prompts whose answers follow from the edit.
        portability_answers: for each of these prompts a text, or a list of texts: the answer, then its aliases.
        multi_hop: complete wordings of one question over a chain of facts; this edit, or this and earlier edits, change
            some of these facts.
        multi_hop_answers: the question's answer after the edits, then its aliases.
        multi_hop_true: the question's answer before the edits; needed for *success*.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    relation: str | None = None
    id: str = ""
    neighborhood_answers: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    portability: tuple[str, ...] = ()
    portability_answers: tuple[tuple[str, ...], ...] = ()
    multi_hop: tuple[str, ...] = ()
    multi_hop_answers: tuple[str, ...] = ()
    multi_hop_true: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise RequestError(f"{self._name}: {name} must be text, got {type(value).__name__} {value!r}")
            if not value.strip():
                raise RequestError(f"{self._name}: {name} is empty")
        if self.prompt.count("{}") != 1:
            raise RequestError(
                f"{self._name}: prompt must have exactly one {{}} for the subject, "
                f"got {self.prompt.count('{}')} in {self.prompt!r}"
            )
        for name in ("target_true", "multi_hop_true"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise RequestError(f"{self._name}: {name} must be non-empty text or absent, got {value!r}")
        for name in LISTS:
            value, kind = getattr(self, name), "answers" if name.endswith("_answers") else "prompts"
            if not isinstance(value, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in value):
                raise RequestError(f"{self._name}: {name} must be a list of non-empty {kind}, got {value!r}")
            if kind == "prompts" and any("{}" in p for p in value):
                raise RequestError(f"{self._name}: {name} must be complete prompts, without {{}}, got {value!r}")
            object.__setattr__(self, name, tuple(_written(p) if kind == "prompts" else p.strip() for p in value))
        if len(self.neighborhood_answers) not in (0, len(self.neighborhood)):
            raise RequestError(
                f"{self._name}: neighborhood_answers must be one for each of the {len(self.neighborhood)} prompts of "
                f"neighborhood, or absent, got {len(self.neighborhood_answers)}"
            )
        self._check_portability()
        if bool(self.multi_hop) != bool(self.multi_hop_answers):
            raise RequestError(
                f"{self._name}: multi_hop and multi_hop_answers: expected both or neither, got {self.multi_hop!r} and "
                f"{self.multi_hop_answers!r}"
            )
        if not (self.relation is None or isinstance(self.relation, str)):
            raise RequestError(f"{self._name}: relation must be text or absent, got {self.relation!r}")
        object.__setattr__(self, "id", str(self.id))
        object.__setattr__(self, "prompt", _written(self.prompt))
        object.__setattr__(self, "subject", self.subject.strip())
        object.__setattr__(self, "target_new", self.target_new.strip())
        if self.target_true is not None:
            object.__setattr__(self, "target_true", self.target_true.strip())
            if self.target_true == self.target_new:
                raise RequestError(f"{self._name}: target_new and target_true are both {self.target_new!r}")
        if self.multi_hop_true is not None:
            object.__setattr__(self, "multi_hop_true", self.multi_hop_true.strip())

    def _check_portability(self) -> None:
        given = self.portability_answers
        each: list[Any] = (
            [[a] if isinstance(a, str) else a for a in given] if isinstance(given, (list, tuple)) else [None]
        )
        sound = all(
            isinstance(a, (list, tuple)) and a and all(isinstance(t, str) and t.strip() for t in a) for a in each
        )
        if not sound or len(each) != len(self.portability):
            raise RequestError(
                f"{self._name}: portability_answers must be a text or a list of texts for each of the "
                f"{len(self.portability)} prompts of portability, got {given!r}"
            )
        object.__setattr__(self, "portability_answers", tuple(tuple(text.strip() for text in a) for a in each))

    @property
    def _name(self) -> str:
        return f"request {self.id!r}" if self.id != "" else f"request about {self.subject!r}"

    @property
    def text(self) -> str:
        """The prompt with the subject in place."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The request in the plain schema, with portability and multi-hop questions only if there are any."""
        return {name: value for name, value in vars(self).items() if value or name not in _FOLLOWS}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], id: str = "") -> EditRequest:
        """Build a request from the plain JSONL schema; unknown keys are refused, so that a typing error shows."""
        unknown = sorted(set(record) - set(FIELDS))
        if unknown:
            raise RequestError(f"request {id!r}: unknown field {unknown[0]!r}; known fields are {', '.join(FIELDS)}")
        missing = [name for name in ("prompt", "subject", "target_new") if name not in record]
        if missing:
            raise RequestError(f"request {id!r}: field {missing[0]!r} is missing")
        return cls(**{"id": id, **{key: value for key, value in record.items() if value is not None}})


def joint(prompt: str) -> str:
    """The text between a prompt and its target: nothing after whitespace, else one blank."""
    return "" if prompt[-1:].isspace() else " "


def _written(prompt: str) -> str:
    """A prompt without the blank that `joint` would put after it."""
    bare = prompt.removesuffix(" ")
    return bare if joint(bare) else prompt


_FOLLOWS = ("portability", "portability_answers", "multi_hop", "multi_hop_answers", "multi_hop_true")
LISTS = (
    *("paraphrases", "neighborhood", "generation", "neighborhood_answers"),
    *("portability", "multi_hop", "multi_hop_answers"),
)
FIELDS = tuple(field.name for field in fields(EditRequest))


def as_requests(requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """Convert requests and plain dictionaries, in any mixture; dictionaries without an id get their index as id."""
    out = []
    for i, request in enumerate(requests):
        if isinstance(request, EditRequest):
            out.append(request)
        elif isinstance(request, Mapping):
            out.append(EditRequest.from_dict(request, id=str(i)))
        else:
            raise RequestError(f"request {i}: expected an EditRequest or a dict, got {type(request).__name__}")
    return out


class Conflict(NamedTuple):
    """Two requests of one batch with the same prompt and subject, but different new targets."""

    batch: int
    first: EditRequest
    later: EditRequest

    def __str__(self) -> str:
        return (
            f"requests {self.first.id!r} and {self.later.id!r} contradict each other: "
            f"{self.later.text!r} → {self.first.target_new!r} and → {self.later.target_new!r}"
        )


def conflicts(requests: Sequence[EditRequest], batch_size: int) -> list[Conflict]:
    """The contradictions within batches: each later request with the first request that it contradicts."""
    return _walk(requests, batch_size, skip=False)[1]


def _walk(requests: Sequence[EditRequest], batch_size: int, skip: bool) -> tuple[list[EditRequest], list[Conflict]]:
    """The requests to edit, and the contradictions within batches; ``skip`` leaves out each later request."""
    kept: list[EditRequest] = []
    found: list[Conflict] = []
    seen: dict[str, EditRequest] = {}
    for request in requests:
        if len(kept) % batch_size == 0:
            seen = {}
        other = seen.setdefault(_asked(request), request)
        contradicts = other.target_new != request.target_new
        if contradicts:
            found.append(Conflict(len(kept) // batch_size, other, request))
        if not (contradicts and skip):
            kept.append(request)
    return kept, found


def duplicates(requests: Sequence[EditRequest]) -> list[tuple[EditRequest, EditRequest]]:
    """Pairs of requests for the same edit: the first one, and each later one."""
    seen: dict[tuple[str, str], EditRequest] = {}
    pairs = ((seen.setdefault((_asked(request), request.target_new), request), request) for request in requests)
    return [(first, later) for first, later in pairs if first is not later]


def check_batches(requests: Sequence[EditRequest], batch_size: int) -> None:
    """Raise RequestError for contradictions within a batch; the message names all contradictions, up to 20."""
    if found := conflicts(requests, batch_size):
        count = f"{len(found)} contradictions: " if len(found) > 1 else ""
        told = listed(f"batch {conflict.batch} (batch size {batch_size}): {conflict}" for conflict in found)
        raise RequestError(f"{count}{told}")


def settle_conflicts(
    requests: Sequence[EditRequest],
    batch_size: int,
    on_conflict: str = "refuse",
    on_note: Callable[[str], None] = warnings.warn,
) -> list[EditRequest]:
    """The requests without contradictions in a batch.

    Args:
        on_conflict: ``refuse``, or ``skip``: leave the later request of each contradiction out. Later requests move up.
        on_note: called with the requests left out, if any.

    Raises:
        RequestError: there are contradictions to refuse, or ``on_conflict`` is neither of the two.
    """
    if on_conflict not in ON_CONFLICT:
        raise RequestError(f"on_conflict: expected one of {', '.join(ON_CONFLICT)}, got {on_conflict!r}")
    if on_conflict == "refuse":
        check_batches(requests, batch_size)
        return list(requests)
    kept, found = _walk(requests, batch_size, skip=True)
    if found:
        told = listed(f"{conflict.later.id!r} (batch {conflict.batch}: {conflict})" for conflict in found)
        on_note(f"{len(found)} of {len(requests)} requests contradict an earlier one of their batch; left out: {told}")
    return kept


def listed(texts: Iterable[str], most: int = 20) -> str:
    """The first ``most`` texts in one line, then the number of the others."""
    every = list(texts)
    return "; ".join(every[:most]) + (f"; and {len(every) - most} more" if len(every) > most else "")


def _asked(request: EditRequest) -> str:
    """The prompt of a request with its subject, in one case and with single blanks."""
    return " ".join(request.text.split()).casefold()


def batches(requests: Sequence[EditRequest], batch_size: int) -> list[Sequence[EditRequest]]:
    """The requests in order, ``batch_size`` at a time; the last batch may be smaller."""
    return [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
