"""Facts that nobody edits, from which statistics of a model are taken before its first edit."""

from __future__ import annotations

from sphere_edit.data import world_facts
from sphere_edit.data.requests import EditRequest


def other_facts(setting: str, wanted: int, seed: int) -> list[EditRequest]:
    """So many world-facts from all over the list, of another seed than its default: the batches to come are not looked
    at. Edits that are world-facts themselves may be about some of the same subjects, with other targets.

    Args:
        setting: what asks for them, for the error.

    Raises:
        ValueError: there are not as many. ImportError: as `sphere_edit.data.world_facts`.
    """
    if not wanted:
        return []
    known = world_facts(seed=1 + seed)
    if wanted > len(known):
        raise ValueError(f"{setting}: expected at most {len(known)}, as many world-facts as there are, got {wanted}")
    return [known[i * len(known) // wanted] for i in range(wanted)]
