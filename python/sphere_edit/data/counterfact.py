"""CounterFact and MultiCounterFact in the published schema (Meng et al. 2022, ROME and MEMIT)."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import DataError, Fields
from sphere_edit.data.requests import EditRequest

NAME = "CounterFact"
READ = (
    "case_id",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "generation_prompts",
    "mcf_index",
)


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema."""
    return "requested_rewrite" in fields


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request.

    Args:
        where: place of the record, for messages.
        fields: ``case_id``, ``requested_rewrite`` with ``prompt``, ``subject``, ``target_new.str``,
            ``target_true.str`` and perhaps ``relation_id``, then ``paraphrase_prompts``, ``neighborhood_prompts`` and
            perhaps ``generation_prompts``. Other fields are not read.
        position: not used; ``case_id`` is the id.

    Raises:
        DataError: a field is missing or of the wrong type.
        RequestError: the fields do not make an edit, e.g. the prompt has no ``{}``.
    """
    record = Fields(where, fields)
    rewrite = record.inside("requested_rewrite")
    return EditRequest(
        id=record.identifier("case_id"),
        prompt=rewrite.text("prompt"),
        subject=rewrite.text("subject"),
        target_new=rewrite.inside("target_new").text("str"),
        target_true=rewrite.inside("target_true").text("str"),
        paraphrases=record.texts("paraphrase_prompts", required=True),
        neighborhood=record.texts("neighborhood_prompts", required=True),
        relation=rewrite.optional_text("relation_id"),
        generation=record.texts("generation_prompts", required=False),
    )


def mcf_index(where: str, fields: dict[str, Any]) -> int | None:
    """The record's index in ``multi_counterfact.json``; None for a record that is not in that file.

    Raises:
        DataError: the record has no field ``mcf_index`` (published files have none: their order is the file's order).
    """
    if "mcf_index" not in fields:
        raise DataError(f"{where}: order 'mcf_index' needs the field 'mcf_index' (an integer or null) in each record")
    value = fields["mcf_index"]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise DataError(f"{where}: field 'mcf_index' must be an integer from 0, or null, got {value!r}")
    return value
