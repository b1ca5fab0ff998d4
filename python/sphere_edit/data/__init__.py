"""Where edit requests come from: files in two schemas, and facts about the world made from GeoNames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphere_edit.data import counterfact, jsonl
from sphere_edit.data.reading import DataError, read_records
from sphere_edit.data.world_facts import parse_spec, world_facts
from sphere_edit.requests import EditRequest, RequestError

__all__ = ["DataError", "load_requests", "world_facts"]

_Parse = Callable[[str, dict[str, Any], int], EditRequest]


def load_requests(spec: str | Path, *, limit: int | None = None, order: str | None = None) -> list[EditRequest]:
    """Load edit requests. Everything is checked before anything is returned; nothing is unpickled or executed.

    Args:
        spec: a file, or ``world-facts`` (see world_facts), optionally with relations and settings:
            ``world-facts:city-country,country-capital,seed=1``. In a file the content decides: a JSON list or JSON
            lines, plain or gzip, of records in the published CounterFact schema (see counterfact) or the plain one
            (see jsonl). A file of that very name is reached as ``./world-facts``.
        limit: how many requests to return at most; fewer where there are fewer. None is all.
        order: None keeps the order of the file. ``"mcf_index"`` keeps only the CounterFact records that have an
            ``mcf_index``, sorted by it: the records and the order of ``multi_counterfact.json``, which the published
            AlphaEdit and SPHERE runs read.

    Raises:
        DataError: the file cannot be used; the message names the file, and the line or record.
        RequestError: ``spec``, ``limit`` or ``order`` is not one of the above.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RequestError(f"limit must be a positive integer or None, got {limit!r}")
    if order not in (None, "mcf_index"):
        raise RequestError(f"order must be None or 'mcf_index', got {order!r}")
    if str(spec).partition(":")[0] == "world-facts" and not isinstance(spec, Path):
        if order is not None:
            raise RequestError(f"order {order!r} is for CounterFact files; {spec!r} has an order of its own")
        return world_facts(**parse_spec(spec), limit=limit)
    if not Path(spec).exists():
        raise DataError(f"{spec}: no such file; requests come from a file, or from 'world-facts[:RELATION,…]'")
    return _load_file(Path(spec), order)[:limit]


def _load_file(path: Path, order: str | None) -> list[EditRequest]:
    parse: _Parse | None = None
    requests: list[EditRequest] = []
    first_seen: dict[str, str] = {}
    keys: dict[int, tuple[str, EditRequest]] = {}
    for position, (where, fields) in enumerate(read_records(path)):
        parse = parse or _schema(where, fields, order)
        try:
            request = parse(where, fields, position)
        except DataError:
            raise
        except RequestError as error:
            raise DataError(f"{where}: {error}") from error
        if request.id in first_seen:
            raise DataError(f"{where}: id {request.id!r} is used twice; first in {first_seen[request.id]}")
        first_seen[request.id] = where
        requests.append(request)
        if order == "mcf_index" and (key := counterfact.mcf_index(where, fields)) is not None:
            if key in keys:
                raise DataError(f"{where}: mcf_index {key} is used twice; first in {keys[key][0]}")
            keys[key] = where, request
    if order is None:
        return requests
    if not keys:
        raise DataError(f"{path}: order 'mcf_index' keeps the records with an mcf_index, and it is null in all")
    return [keys[key][1] for key in sorted(keys)]


def _schema(where: str, fields: dict[str, Any], order: str | None) -> _Parse:
    if counterfact.recognises(fields):
        return counterfact.parse
    if not jsonl.recognises(fields):
        raise DataError(
            f"{where}: neither schema fits; expected 'requested_rewrite' (CounterFact) or 'prompt', 'subject' and "
            f"'target_new' (plain), got the fields {sorted(fields)[:8]}"
        )
    if order is not None:
        raise DataError(f"{where}: order {order!r} is for CounterFact files, and this is the plain schema")
    return jsonl.parse
