"""MQuAKE (Zhong et al. 2023): edits, with the multi-hop questions whose answers they change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphere_edit.data.reading import DataError, Fields, Record

NAME = "MQuAKE"
READ = ("case_id", "requested_rewrite", "questions", "answer", "new_answer", "new_answer_alias")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record is a case of this schema."""
    return "questions" in fields and isinstance(fields.get("requested_rewrite"), list)


def records(where: str, fields: dict[str, Any]) -> Iterator[Record]:
    """Turn one case into records of the plain schema, one for each edit.

    The last record has the case's multi-hop questions, which ask about all of its edits.

    Args:
        where: place of the case, for messages.
        fields: ``case_id``, ``requested_rewrite`` (objects with ``prompt``, ``subject``, ``target_new.str``,
            ``target_true.str``, and perhaps ``question``, the paraphrase, and ``relation_id``), ``questions``,
            ``new_answer``, and perhaps ``new_answer_alias`` and ``answer``. Other fields (single hops and triples of
            the chains, aliases of the old answer) are not read.

    Raises:
        DataError: a field is missing or of the wrong type.
    """
    case = Fields(where, fields)
    rewrites = case.objects("requested_rewrite")
    if not rewrites:
        raise DataError(f"{where}: 'requested_rewrite' is empty; expected at least one")
    for number, rewrite in enumerate(rewrites, start=1):
        last = follows(case) if number == len(rewrites) else {}
        yield Record(
            f"{where}, rewrite {number}",
            {
                "id": f"{case.identifier('case_id')}.{number}",
                "prompt": rewrite.text("prompt"),
                "subject": rewrite.text("subject"),
                "target_new": rewrite.inside("target_new").text("str"),
                "target_true": rewrite.inside("target_true").text("str"),
                "paraphrases": list(rewrite.some_text("question")),
                "relation": rewrite.optional_text("relation_id"),
                **last,
            },
        )


def follows(case: Fields) -> dict[str, Any]:
    """The multi-hop questions of a case, in fields of the plain schema."""
    new = [case.text("new_answer"), *case.answers("new_answer_alias")]
    old = case.optional_text("answer")
    return {
        "multi_hop": list(case.texts("questions", required=True)),
        "multi_hop_answers": list(dict.fromkeys(text.strip() for text in new)),
        "multi_hop_true": None if old in new else old,
    }
