"""The project's own plain schema: one flat JSON object per edit."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import DataError, Fields
from sphere_edit.data.requests import FIELDS, LISTS, EditRequest

NAME = "plain"
READ = FIELDS


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema, or near enough that a message about its fields helps."""
    return any(name in fields for name in ("prompt", "subject", "target_new"))


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request.

    Args:
        where: place of the record, for messages.
        fields: ``prompt`` with one ``{}``, ``subject``, ``target_new``; optional, absent or null: ``target_true``,
            ``paraphrases``, ``neighborhood``, ``relation``, ``id`` (text or an integer), ``neighborhood_answers``,
            ``generation``, ``portability``, ``portability_answers``, ``multi_hop``, ``multi_hop_answers``,
            ``multi_hop_true``. See EditRequest.
        position: index of the record in the file; the id of a record without one.

    Raises:
        DataError: a field is missing, unknown or of the wrong type.
        RequestError: the fields do not make an edit.
    """
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(FIELDS)}")
    record = Fields(where, fields)
    name = record.optional_identifier("id")
    return EditRequest(
        id=str(position) if name is None else name,
        prompt=record.text("prompt"),
        subject=record.text("subject"),
        target_new=record.text("target_new"),
        target_true=record.optional_text("target_true"),
        relation=record.optional_text("relation"),
        portability_answers=record.each("portability_answers") if fields.get("portability_answers") else (),
        multi_hop_true=record.optional_text("multi_hop_true"),
        **{name: record.texts(name, required=False) for name in LISTS},
    )
