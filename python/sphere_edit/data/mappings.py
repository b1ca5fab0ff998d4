"""Records from Python: a data set, a data frame, or any other iterable of mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sphere_edit.data.reading import DataError, Record


def read_mappings(source: Any) -> Iterator[Record]:
    """Yield the records of an object in order; None and NaN are absent fields.

    Args:
        source: a ``datasets.Dataset``, a pandas data frame, or an iterable of mappings. Arrays become lists.

    Raises:
        DataError: the object is none of these, or has no records; the message names the record.
    """
    if hasattr(source, "to_dict") and hasattr(source, "iterrows"):
        source = source.to_dict("records")
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        shown = f" with the keys {sorted(map(str, source))[:8]}" if isinstance(source, Mapping) else ""
        raise DataError(f"records: expected a file or an iterable of mappings, got {type(source).__name__}{shown}")
    found = False
    for index, record in enumerate(source):
        where = f"record {index}"
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: expected a mapping, got {type(record).__name__}")
        found = True
        plain = {str(name): _plain(value) for name, value in record.items()}
        yield Record(where, {name: value for name, value in plain.items() if value is not None})
    if not found:
        raise DataError("records: there are none; expected at least one")


def _plain(value: Any) -> Any:
    """A value in JSON's types; a missing value is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    is_missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if is_missing else value
