"""Turn records into requests: recognise the schema, and note the records left out and the fields not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sphere_edit.data import akew, counterfact, easyedit, jsonl, lre, mquake, qaedit, unke, wikibigedit, zsre
from sphere_edit.data.mappings import read_mappings
from sphere_edit.data.reading import DataError, NoEditError, Record, read_records
from sphere_edit.data.requests import EditRequest, RequestError
from sphere_edit.data.tables import is_table, read_table


class _Schema(NamedTuple):
    name: str
    read: tuple[str, ...]
    parse: Callable[[str, dict[str, Any], int], EditRequest]


# Schemas whose records become several plain ones. Order matters: AKEW's records may have MQuAKE's fields, and both may
# have CounterFact's.
_SEVERAL: tuple[Any, ...] = (lre, akew, mquake)
# EasyEdit's records may have WikiBigEdit's fields, and both have the plain ones: the first schema that fits counts.
_SCHEMAS = (counterfact, zsre, unke, qaedit, easyedit, wikibigedit, jsonl)


@dataclass(frozen=True)
class Loaded:
    """Contents of a source of requests.

    Args:
        schema: name of the schema of all records.
        requests: the edits, in order.
        left_out: for each record that is no edit, its place and the reason.
        unread: the fields that the schema does not read, sorted.
    """

    schema: str
    requests: list[EditRequest]
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def say(self, name: str, on_note: Callable[[str], None]) -> None:
        """Call ``on_note`` with the records left out and the fields not read.

        Raises:
            DataError: all records were left out.
        """
        if self.left_out:
            count = len(self.left_out) + len(self.requests)
            said = f"{name}: {len(self.left_out)} of {count} records are no edits; the first: {self.left_out[0]}"
            if not self.requests:
                raise DataError(said)
            on_note(f"{said}; left out")
        if self.unread:
            on_note(f"{name}: fields not read: {', '.join(self.unread)}")


def load_source(source: Any, order: str | None = None) -> Loaded:
    """Read and check all records of a file, or of an iterable of mappings (see load_requests).

    Raises:
        DataError: the source cannot be used; the message names the place.
    """
    if isinstance(source, Path):
        name, records = str(source), read_table(source) if is_table(source) else read_records(source)
    else:
        name, records = "records", read_mappings(source)
    unread: dict[str, None] = {}
    schema, records = _recognised(records, order, unread)
    requests: list[EditRequest] = []
    left_out: list[str] = []
    first_seen: dict[str, str] = {}
    keys: dict[int, tuple[str, EditRequest]] = {}
    for position, (where, fields) in enumerate(records):
        unread.update(dict.fromkeys(field for field in fields if field not in schema.read))
        try:
            request = schema.parse(where, fields, position)
        except NoEditError as error:
            left_out.append(str(error))
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
    if order is not None and requests:
        if not keys:
            raise DataError(f"{name}: order 'mcf_index' keeps the records with an mcf_index, and it is null in all")
        requests = [keys[key][1] for key in sorted(keys)]
    return Loaded(schema.name, requests, tuple(left_out), tuple(sorted(unread)))


def _recognised(
    records: Iterator[Record], order: str | None, unread: dict[str, None]
) -> tuple[_Schema, Iterator[Record]]:
    """The schema of the first record, and all records; a record of `_SEVERAL` becomes one for each edit."""
    first = next(records)  # the readers refuse a source without records
    records = chain([first], records)
    if several := next((s for s in _SEVERAL if s.recognises(first.fields)), None):
        schema = _Schema(several.NAME, jsonl.READ, jsonl.parse)
        records = _edits(several, records, unread)
    else:
        found = next((s for s in _SCHEMAS if s.recognises(first.fields)), None)
        if found is None:
            raise DataError(
                f"{first.where}: no schema fits; expected 'requested_rewrite' (CounterFact, MQuAKE, AKEW), 'src' "
                "(zsRE), 'update' or 'rephrase_prompt' (WikiBigEdit), 'ground_truth' or 'locality' (EasyEdit), "
                "'target' (QAEdit), 'para_question' (UnKE), or 'prompt', 'subject' and 'target_new' (plain), in a list "
                f"of records or one object a line, got the fields {sorted(first.fields)[:8]}"
            )
        schema = _Schema(found.NAME, found.READ, found.parse)
    if order is not None and schema.name != counterfact.NAME:
        raise DataError(
            f"{first.where}: order {order!r} is for CounterFact files, and this is the schema {schema.name}"
        )
    return schema, records


def _edits(schema: Any, found: Iterator[Record], unread: dict[str, None]) -> Iterator[Record]:
    for where, fields in found:
        unread.update(dict.fromkeys(field for field in fields if field not in schema.READ))
        yield from schema.records(where, fields)
