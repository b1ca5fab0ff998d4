"""QAEdit (Yang et al. 2025, "The Mirage of Model Editing"): questions of real data sets that a model gets wrong."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import Fields
from sphere_edit.data.requests import EditRequest

NAME = "QAEdit"
READ = ("id", "prompt", "target", "subject", "rephrase", "locality")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema."""
    return "prompt" in fields and "target" in fields and "target_new" not in fields


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request without a true target, and so without *success*.

    Args:
        where: place of the record, for messages.
        fields: ``prompt`` with the ``subject`` in it, ``target``; optional: ``id``, ``rephrase``, ``locality`` (objects
            with ``loc`` and ``loc_ans``; an object without answer is no neighbour). Other fields (``source``) are not
            read.
        position: index of the record in the file; the id of a record without one.

    Raises:
        DataError: a field is missing or of the wrong type. NoEditError: the subject is not in the prompt.
        RequestError: the fields do not make an edit.
    """
    record = Fields(where, fields)
    local = [
        (prompt, answer)
        for pair in record.objects("locality")
        for prompt, answer in zip(pair.some_text("loc"), pair.some_text("loc_ans"), strict=False)
    ]
    return EditRequest(
        id=record.optional_identifier("id") or str(position),
        prompt=record.template("prompt", "subject"),
        subject=record.text("subject"),
        target_new=record.text("target"),
        paraphrases=record.answers("rephrase"),
        neighborhood=tuple(prompt for prompt, _ in local),
        neighborhood_answers=tuple(answer for _, answer in local),
    )
