"""Relations of LRE (Hernandez et al. 2024): templates, and samples of subject and object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sphere_edit.data.reading import DataError, Fields, Record

NAME = "LRE"
READ = ("name", "prompt_templates", "samples")


def recognises(fields: dict[str, Any]) -> bool:
    """Whether an object is a relation of this schema."""
    return "prompt_templates" in fields and "samples" in fields


def records(where: str, fields: dict[str, Any]) -> Iterator[Record]:
    """Turn one relation into records of the plain schema, one for each sample.

    LRE holds true facts: ``target_new`` is the true object, and there is no ``target_true``. The first template is the
    prompt, the others make the paraphrases.

    Args:
        where: place of the relation, for messages.
        fields: ``prompt_templates`` (each with ``{}``), ``samples`` of ``subject`` and ``object``, and perhaps
            ``name``. Other fields (``properties``, ``prompt_templates_zs``) are not read.

    Raises:
        DataError: a field is missing or of the wrong type.
    """
    relation = Fields(where, fields)
    templates = relation.texts("prompt_templates", required=True)
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(f"{where}: 'prompt_templates' must have one {{}} each, got {template!r}")
    samples = relation.objects("samples")
    if not templates or not samples:
        empty = "samples" if templates else "prompt_templates"
        raise DataError(f"{where}: '{empty}' is empty; expected at least one")
    prompt, *others = templates
    for number, sample in enumerate(samples):
        subject = sample.text("subject")
        yield Record(
            f"{where}, sample {number}",
            {
                "prompt": prompt,
                "subject": subject,
                "target_new": sample.text("object"),
                "paraphrases": [other.replace("{}", subject.strip()) for other in others],
                "relation": relation.optional_text("name"),
            },
        )
