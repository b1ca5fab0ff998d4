"""Sources of edit requests: files and records in ten schemas, and facts about the world made from GeoNames."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere_edit.data.loading import Loaded, load_source
from sphere_edit.data.reading import DataError
from sphere_edit.data.requests import EditRequest, RequestError
from sphere_edit.data.world_facts import parse_spec, world_facts

__all__ = ["DataError", "Loaded", "load", "load_requests", "world_facts"]


def load_requests(
    spec: str | Path | Iterable[Any],
    *,
    limit: int | None = None,
    order: str | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> list[EditRequest]:
    """Load edit requests. Everything is checked before anything is returned; nothing is unpickled or executed.

    Args:
        spec: a file, ``world-facts``, or records.

            ``world-facts`` (see world_facts) may have relations and settings:
            ``world-facts:city-country,country-capital,seed=1``. A file named like that is reached as ``./world-facts``.

            The content of a file decides its format: a JSON list, JSON lines or one object, plain or gzip, of records
            in the published schema of CounterFact, zsRE, EasyEdit (and KnowEdit), QAEdit, MQuAKE, WikiBigEdit, LRE,
            UnKE or AKEW, or in the plain one (see the modules of these names; the plain schema is in jsonl). Only
            tables are told by name: ``.csv`` or ``.tsv``, perhaps with ``.gz``, with fields as columns (see tables).

            Records are a ``datasets.Dataset``, a pandas data frame, or any iterable of mappings, in the same schemas;
            None and NaN are absent fields.
        limit: the most requests to return; None returns all.
        order: None keeps the order of the file. ``"mcf_index"`` keeps only the CounterFact records that have an
            ``mcf_index``, sorted by it: the records and the order of ``multi_counterfact.json``, which the published
            AlphaEdit and SPHERE runs read.
        on_note: called with the number of records left out because they are no edits, and the reason; and with the
            fields that the schema does not read.

    Raises:
        DataError: the source cannot be used; the message names the file, and the line or record.
        RequestError: ``spec``, ``limit`` or ``order`` is not one of the above.
    """
    loaded = load(spec, limit=limit, order=order)
    loaded.say(str(spec) if isinstance(spec, (str, Path)) else "records", on_note)
    return loaded.requests


def load(spec: str | Path | Iterable[Any], *, limit: int | None = None, order: str | None = None) -> Loaded:
    """Load requests with the name of their schema and notes on the records; arguments as for load_requests."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RequestError(f"limit must be a positive integer or None, got {limit!r}")
    if order not in (None, "mcf_index"):
        raise RequestError(f"order must be None or 'mcf_index', got {order!r}")
    if isinstance(spec, str) and spec.partition(":")[0] == "world-facts":
        if order is not None:
            raise RequestError(f"order {order!r} is for CounterFact files; {spec!r} has an order of its own")
        return Loaded("world-facts", world_facts(**parse_spec(spec), limit=limit))
    if isinstance(spec, (str, Path)) and not Path(spec).exists():
        raise DataError(f"{spec}: no such file; requests come from a file, or from 'world-facts[:RELATION,…]'")
    loaded = load_source(Path(spec) if isinstance(spec, str) else spec, order)
    return replace(loaded, requests=loaded.requests[:limit])
