"""Records of EasyEdit (Wang et al. 2024) and of its benchmark KnowEdit (Zhang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphere_edit.data.reading import DataError, Fields, NoEditError
from sphere_edit.data.requests import EditRequest

NAME = "EasyEdit"
READ = (
    "case_id",
    "id",
    "prompt",
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "locality",
    "locality_prompt",
    "locality_ground_truth",
    "portability",
    "portability_prompt",
    "portability_ground_truth",
)


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema. A record with only a rephrased and a local question is WikiBigEdit's; one
    with ``portability_answers`` is plain."""
    own = any(name in fields for name in ("ground_truth", "locality", "portability"))
    return "prompt" in fields and own and "portability_answers" not in fields


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request. EasyEdit's *locality* is the neighbourhood, each prompt with its own answer.

    Args:
        where: place of the record, for messages.
        fields: ``prompt`` (with ``{}`` or the subject itself in place), ``subject``, ``target_new``; optional, absent,
            null or blank: ``ground_truth`` (the true target: a text, or a list of which the first counts),
            ``rephrase_prompt`` (a text or a list), ``locality`` (by name, an object or a list of objects with
            ``prompt`` and ``ground_truth``), ``portability`` (likewise, where all answers to a prompt are aliases of
            the first; or one object with ``New Question`` and ``New Answer``), the flat ``locality_prompt``,
            ``locality_ground_truth``, ``portability_prompt`` and ``portability_ground_truth``, ``case_id`` or ``id``. A
            prompt without an answer is left out. Other fields are not read.
        position: index of the record in the file; the id of a record without one.

    Raises:
        DataError: a field is missing or of the wrong type. NoEditError: the subject is not in the prompt, or the true
            target is the new one.
        RequestError: the fields do not make an edit.
    """
    record = Fields(where, fields)
    name = record.optional_identifier("case_id") or record.optional_identifier("id") or str(position)
    prompt, target = record.text("prompt"), record.text("target_new")
    true = record.answers("ground_truth")
    if true and true[0].strip() == target.strip():
        raise NoEditError(f"{where}: 'ground_truth' and 'target_new' are both {target.strip()!r}")
    local, follows = (list(_asked(where, record, name)) for name in ("locality", "portability"))
    return EditRequest(
        id=name,
        prompt=prompt if "{}" in prompt else record.template("prompt", "subject"),
        subject=record.text("subject"),
        target_new=target,
        target_true=true[0] if true else None,
        paraphrases=record.answers("rephrase_prompt"),
        neighborhood=tuple(prompt for prompt, _ in local),
        neighborhood_answers=tuple(answers[0] for _, answers in local),
        portability=tuple(prompt for prompt, _ in follows),
        portability_answers=tuple(answers for _, answers in follows),
    )


def _asked(where: str, record: Fields, kind: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The prompts of one kind, each with its answers; prompts without an answer are left out."""
    for group in record.objects(kind):
        if "New Question" in group.names():
            yield from _pairs(where, group, "New Question", "New Answer")
            continue
        for name in group.names():
            for pair in group.objects(name):
                yield from _pairs(where, pair, "prompt", "ground_truth")
    yield from _pairs(where, record, f"{kind}_prompt", f"{kind}_ground_truth")


def _pairs(where: str, record: Fields, prompt: str, answer: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """One prompt with its answers, or a list of prompts with a list of as many answers."""
    if not record.is_list(prompt):
        if (asked := record.some_text(prompt)) and (found := record.answers(answer)):
            yield asked[0], found
        return
    prompts, answers = record.texts(prompt, required=True), record.each(answer)
    if len(prompts) != len(answers):
        raise DataError(
            f"{where}: '{prompt}' and '{answer}' must be lists of one length, got {len(prompts)} and {len(answers)}"
        )
    for text, found in zip(prompts, answers, strict=True):
        if text.strip() and found:
            yield text, found
