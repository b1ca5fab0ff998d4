"""Facts that are not edited; they give statistics of a model before its first edit."""

from __future__ import annotations

from sphere_edit.data import world_facts
from sphere_edit.data.requests import EditRequest


def other_facts(setting: str, wanted: int, seed: int) -> list[EditRequest]:
    """``wanted`` world-facts, evenly spread over the list and drawn with another seed than the default one.

    The batches to come are not looked at. Edits that are world-facts themselves may share some subjects with these
    facts, with other targets.

    Args:
        setting: name of the setting that asks for the facts, for the error.

    Raises:
        ValueError: the list has fewer facts. ImportError: as `sphere_edit.data.world_facts`.
    """
    if not wanted:
        return []
    known = world_facts(seed=1 + seed)
    if wanted > len(known):
        raise ValueError(f"{setting}: expected at most {len(known)}, as many world-facts as there are, got {wanted}")
    return [known[i * len(known) // wanted] for i in range(wanted)]
