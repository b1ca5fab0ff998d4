"""UnKEBench (Deng et al. 2024, UnKE): questions, each answered by a text of several sentences."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import DataError, Fields
from sphere_edit.data.requests import EditRequest

NAME = "UnKE"
READ = ("id", "question", "para_question", "answer", "sub_question", "sub_answer")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema."""
    return all(name in fields for name in ("question", "answer", "para_question"))


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request.

    The schema names no subject. The whole question serves as the subject, so that keys are read at the question's last
    token, as UnKE does. The questions about parts of the text are the portability.

    Args:
        where: place of the record, for messages.
        fields: ``question``, ``answer`` (the text), ``para_question``; optional: ``id``, ``sub_question`` and
            ``sub_answer``, lists of one length. Other fields are not read.
        position: index of the record in the file; the id of a record without one.

    Raises:
        DataError: a field is missing or of the wrong type, or the two lists differ in length.
        RequestError: the fields do not make an edit.
    """
    record = Fields(where, fields)
    parts, answers = (record.texts(name, required=False) for name in ("sub_question", "sub_answer"))
    if len(parts) != len(answers):
        raise DataError(
            f"{where}: 'sub_question' and 'sub_answer' must be lists of one length, got {len(parts)} and {len(answers)}"
        )
    return EditRequest(
        id=record.optional_identifier("id") or str(position),
        prompt="{}",
        subject=record.text("question"),
        target_new=record.text("answer"),
        paraphrases=record.some_text("para_question"),
        portability=parts,
        portability_answers=tuple((answer,) for answer in answers),
    )
