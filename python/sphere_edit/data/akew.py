"""AKEW (Wu et al. 2024): facts of CounterFact, MQuAKE-CF and WikiUpdate, each stated in a text of several sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphere_edit.data.mquake import follows
from sphere_edit.data.reading import Fields, Record

NAME = "AKEW"
READ = ("case_id", "requested_rewrite", "paraphrase_prompts", "questions", "answer", "new_answer", "new_answer_alias")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether a record has an edit with a text."""
    found = fields.get("requested_rewrite")
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and "fact_new_uns" in first


def records(where: str, fields: dict[str, Any]) -> Iterator[Record]:
    """Turn one record into records of the plain schema, one for each edit; the text is the new target.

    Portability asks for the facts of the text one by one. The last edit has the multi-hop questions, if any.

    Args:
        where: place of the record, for messages.
        fields: ``case_id`` and ``requested_rewrite``, an object or (MQuAKE-CF) a list of objects with ``prompt``,
            ``subject``, ``fact_new_uns`` (the text), and perhaps ``question`` (a paraphrase), ``relation_id`` and
            ``unsfact_triplets_GPT`` (``prompt`` with ``{}``, ``subject``, ``target``); perhaps ``paraphrase_prompts``,
            and the fields that `mquake` reads. Other fields (the short targets, neighbours, times) are not read.

    Raises:
        DataError: a field is missing or of the wrong type.
    """
    record = Fields(where, fields)
    rewrites, several = record.objects("requested_rewrite"), record.is_list("requested_rewrite")
    for number, rewrite in enumerate(rewrites, start=1):
        name, of = record.identifier("case_id"), f", rewrite {number}"
        parts = [part for part in rewrite.objects("unsfact_triplets_GPT") if part.some_text("target")]
        last = follows(record) if fields.get("questions") and number == len(rewrites) else {}
        yield Record(
            where + of if several else where,
            {
                "id": f"{name}.{number}" if several else name,
                "prompt": rewrite.text("prompt"),
                "subject": rewrite.text("subject"),
                "target_new": rewrite.text("fact_new_uns"),
                "paraphrases": [
                    *([] if several else record.texts("paraphrase_prompts", required=False)),
                    *rewrite.some_text("question"),
                ],
                "relation": rewrite.optional_text("relation_id"),
                "portability": [part.text("prompt").replace("{}", part.text("subject")) for part in parts],
                "portability_answers": [part.text("target") for part in parts],
                **last,
            },
        )
