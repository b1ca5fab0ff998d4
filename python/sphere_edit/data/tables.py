"""Records from CSV and TSV files whose header names the fields."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphere_edit.data.reading import BOM, DataError, Record, opened, utf8
from sphere_edit.data.requests import LISTS

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LISTS = (*LISTS, "portability_answers", "ground_truth", "rephrase_prompt")
_OBJECTS = ("locality", "portability")


def is_table(path: Path) -> bool:
    """Whether a file is named as a table: ``.csv`` or ``.tsv``, perhaps with ``.gz``."""
    return _suffix(path) in _DELIMITERS


def read_table(path: Path) -> Iterator[Record]:
    """Yield the rows of a table in order.

    Args:
        path: CSV or TSV in UTF-8 with a header, plain or gzip, quoted as by spreadsheets. An empty cell is an absent
            field. In a field that may be a list (``paraphrases``, ``neighborhood``, …), a cell that begins with ``[``
            is JSON, any other is one text. In a field of objects (``locality``), a cell is JSON.

    Raises:
        DataError: the file cannot be read, or a row does not fit the header; the message names the line.
    """
    with opened(path) as stream:
        lines = (
            utf8(line.removeprefix(BOM) if number == 1 else line, path, number)
            for number, line in enumerate(stream, start=1)
        )
        rows = csv.reader(lines, delimiter=_DELIMITERS[_suffix(path)], strict=True)
        header: list[str] | None = None
        found = False
        while True:
            where = f"{path}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{where}: not a row of the table ({error})") from error
            if row is None:
                break
            if not row:
                continue
            if header is None:
                header = _header(where, row)
                continue
            if len(row) > len(header):
                raise DataError(f"{where}: {len(row)} cells; the header names {len(header)} columns")
            found = True
            cells = zip(header, row, strict=False)
            yield Record(where, {name: _value(where, name, cell) for name, cell in cells if cell.strip()})
    if not found:
        raise DataError(f"{path}: the table has no rows; expected a header and a row for each record")


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _header(where: str, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    for number, name in enumerate(names, start=1):
        if not name:
            raise DataError(f"{where}: column {number} has no name in the header")
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} is named twice in the header")
    return names


def _value(where: str, name: str, cell: str) -> Any:
    if not (name in _OBJECTS or (name in _LISTS and cell.lstrip().startswith("["))):
        return [cell] if name in LISTS else cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: field {name!r} is invalid JSON ({error})") from error
