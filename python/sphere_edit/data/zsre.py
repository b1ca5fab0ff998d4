"""zsRE questions in MEND's schema (Levy et al. 2017, Mitchell et al. 2022), read in the way of MEMIT."""

from __future__ import annotations

from typing import Any

from sphere_edit.data.reading import Fields
from sphere_edit.data.requests import EditRequest

NAME = "zsRE"
READ = ("subject", "src", "answers", "rephrase", "loc", "loc_ans")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is of this schema."""
    return "src" in fields


def parse(where: str, fields: dict[str, Any], position: int) -> EditRequest:
    """Turn one record into a request, as MEMIT, AlphaEdit and SPHERE do: the first of ``answers`` is the new target.

    The neighbourhood is the unchanged question ``loc`` (with its ``nq question: ``) and ``?``. There is no true target,
    so there is no *success*. The published code scores zsRE by the share of a target's tokens that are the argmax;
    *accuracy* here requires all of them, as everywhere.

    Args:
        where: place of the record, for messages.
        fields: ``subject``, ``src``, ``answers``, and unless absent, null or blank ``rephrase`` and ``loc`` with
            ``loc_ans``. Other fields are not read (``alt`` among them, which EasyEdit takes for the new target).
        position: index of the record in the file, and its id.

    Raises:
        DataError: a field is missing or of the wrong type. NoEditError: the subject is not in ``src``.
        RequestError: the fields do not make an edit.
    """
    record = Fields(where, fields)
    answers = record.texts("answers", required=True)
    loc, answer = record.some_text("loc"), record.some_text("loc_ans")
    return EditRequest(
        id=str(position),
        prompt=record.template("src", "subject"),
        subject=record.text("subject"),
        target_new=answers[0] if answers else "",
        paraphrases=record.some_text("rephrase"),
        neighborhood=tuple(f"{question}?" for question in loc) if answer else (),
        neighborhood_answers=answer if loc else (),
    )
