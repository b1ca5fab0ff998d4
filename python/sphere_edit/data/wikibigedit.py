"""WikiBigEdit (Thede et al. 2025): questions about facts of Wikidata that are new or have changed."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import Fields
from sphere_edit.data.requests import EditRequest

# The authors' field names, and the names that EasyEdit and its successors give the same fields.
_PUBLISHED = ("update", "ans", "rephrase", "loc", "loc_ans")
_EASYEDIT = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")

NAME = "WikiBigEdit"
READ = ("subject", "mhop", "mhop_ans", *_PUBLISHED, *_EASYEDIT)


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema, under either set of names."""
    return "update" in fields or "rephrase_prompt" in fields


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request without a true target, and so without *success*.

    Args:
        where: place of the record, for messages.
        fields: ``subject`` and ``update``, ``ans``, ``rephrase``, ``loc``, ``loc_ans``; or the same as ``prompt``,
            ``target_new``, ``rephrase_prompt``, ``locality_prompt``, ``locality_ground_truth``; and ``mhop`` and
            ``mhop_ans``, the multi-hop question. All but the first three may be absent, null or blank. Other fields
            (personas) are not read.
        position: index of the record in the file, and its id.

    Raises:
        DataError: a field is missing or of the wrong type. NoEditError: the subject is not in the question.
        RequestError: the fields do not make an edit.
    """
    record = Fields(where, fields)
    question, target, rephrase, *locality = _PUBLISHED if "update" in fields else _EASYEDIT
    loc, answer, hop, hop_answer = map(record.some_text, (*locality, "mhop", "mhop_ans"))
    return EditRequest(
        id=str(position),
        prompt=record.template(question, "subject"),
        subject=record.text("subject"),
        target_new=record.text(target),
        paraphrases=record.some_text(rephrase),
        neighborhood=loc if answer else (),
        neighborhood_answers=answer if loc else (),
        multi_hop=hop if hop_answer else (),
        multi_hop_answers=hop_answer if hop else (),
    )
