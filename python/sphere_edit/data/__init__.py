"""Where edit requests come from: files in four schemas, and facts about the world made from GeoNames."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphere_edit.data import counterfact, jsonl, wikibigedit, zsre
from sphere_edit.data.reading import DataError, NoEditError, read_records
from sphere_edit.data.world_facts import parse_spec, world_facts
from sphere_edit.requests import EditRequest, RequestError

__all__ = ["DataError", "load_requests", "world_facts"]

_Parse = Callable[[str, dict[str, Any], int], EditRequest]


def load_requests(
    spec: str | Path,
    *,
    limit: int | None = None,
    order: str | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> list[EditRequest]:
    """Load edit requests. Everything is checked before anything is returned; nothing is unpickled or executed.

    Args:
        spec: a file, or ``world-facts`` (see world_facts), optionally with relations and settings:
            ``world-facts:city-country,country-capital,seed=1``. In a file the content decides: a JSON list or JSON
            lines, plain or gzip, of records in the published schema of CounterFact, zsRE or WikiBigEdit, or in the
            plain one (see the modules counterfact, zsre, wikibigedit, jsonl). A file named like the facts is reached as
            ``./world-facts``.
        limit: how many requests to return at most; fewer where there are fewer. None is all.
        order: None keeps the order of the file. ``"mcf_index"`` keeps only the CounterFact records that have an
            ``mcf_index``, sorted by it: the records and the order of ``multi_counterfact.json``, which the published
            AlphaEdit and SPHERE runs read.
        on_note: called with how many records were left out because they are no edits, and why.

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
    return _load_file(Path(spec), order, on_note)[:limit]


def _load_file(path: Path, order: str | None, on_note: Callable[[str], None]) -> list[EditRequest]:
    parse: _Parse | None = None
    requests: list[EditRequest] = []
    left_out: list[NoEditError] = []
    first_seen: dict[str, str] = {}
    keys: dict[int, tuple[str, EditRequest]] = {}
    for position, (where, fields) in enumerate(read_records(path)):
        parse = parse or _schema(where, fields, order)
        try:
            request = parse(where, fields, position)
        except NoEditError as error:
            left_out.append(error)
            continue
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
    if left_out:
        count = len(left_out) + len(requests)
        said = f"{path}: {len(left_out)} of {count} records are no edits; the first: {left_out[0]}"
        if not requests:
            raise DataError(said)
        on_note(f"{said}; left out")
    if order is None:
        return requests
    if not keys:
        raise DataError(f"{path}: order 'mcf_index' keeps the records with an mcf_index, and it is null in all")
    return [keys[key][1] for key in sorted(keys)]


def _schema(where: str, fields: dict[str, Any], order: str | None) -> _Parse:
    schema = next((s for s in (counterfact, zsre, wikibigedit, jsonl) if s.recognises(fields)), None)
    if schema is None:
        raise DataError(
            f"{where}: no schema fits; expected 'requested_rewrite' (CounterFact), 'src' (zsRE), 'update' or "
            f"'rephrase_prompt' (WikiBigEdit), or 'prompt', 'subject' and 'target_new' (plain), got the fields "
            f"{sorted(fields)[:8]}"
        )
    if order is not None and schema is not counterfact:
        name = schema.__name__.rpartition(".")[2]
        raise DataError(f"{where}: order {order!r} is for CounterFact files, and this is the schema {name}")
    return schema.parse
