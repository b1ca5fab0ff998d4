"""Read JSON records from a file, with errors that name the place."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sphere_edit.data.requests import RequestError

_GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"


class DataError(RequestError):
    """A file of requests that cannot be used; the message names the file, the line (or record) and the problem."""


class NoEditError(DataError):
    """A record of a sound file that is no edit of a subject; loaders leave the record out and say so."""


class Record(NamedTuple):
    """One JSON object of a file and its place, e.g. ``edits.jsonl, line 3``."""

    where: str
    fields: dict[str, Any]


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the JSON objects of a file in order, reading no further than asked.

    Args:
        path: a JSON list of objects, JSON lines, or one object over several lines; plain or gzip. The content decides,
            not the name, but a file named ``.gz`` must be gzip. Blank lines are skipped; a byte order mark is accepted.

    Raises:
        DataError: the file is missing, unreadable, empty, not gzip though named so, cut off or damaged, not UTF-8,
            not JSON, or holds something other than objects.
    """
    path = Path(path)
    found = False
    with opened(path) as stream:
        for record in _records(stream, path):
            found = True
            yield record
    if not found:
        raise DataError(f"{path}: the file is empty; expected a JSON list of records, or one JSON object per line")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open the decompressed content of a file; an error while reading names the file."""
    try:
        with open(path, "rb") as raw:
            yield _decompressed(raw, path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except EOFError as error:
        raise DataError(f"{path}: the gzip data ends too early; the file was cut off") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    magic = raw.read(len(_GZIP_MAGIC))
    raw.seek(0)
    if magic == _GZIP_MAGIC:
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if path.suffix == ".gz" and magic:
        raise DataError(f"{path}: not gzip data, though the name ends in .gz")
    return raw


def _records(stream: BinaryIO, path: Path) -> Iterator[Record]:
    is_list: bool | None = None
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        if is_list is None:
            is_list = line.lstrip().startswith(b"[")
            if is_list:
                yield from _list_records(line + stream.read(), path, number)
                return
            if _goes_on(line):
                data = (line + stream.read()).rstrip()
                where = f"{path}, one JSON object"
                yield Record(where, _object(_parse(utf8(data, path, number), path, number), where))
                return
        where = f"{path}, line {number}"
        yield Record(where, _object(_parse(utf8(line, path, number), path, number), where))


def _goes_on(line: bytes) -> bool:
    """Whether a line is a valid beginning of an object that later lines complete."""
    try:
        json.loads(text := line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        return not text[error.pos :].strip()
    except (ValueError, RecursionError):
        pass
    return False


def _list_records(data: bytes, path: Path, first_line: int) -> Iterator[Record]:
    for index, value in enumerate(_parse(utf8(data, path, first_line), path, first_line)):
        where = f"{path}, record {index}"
        yield Record(where, _object(value, where))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def utf8(data: bytes, path: Path, first_line: int) -> str:
    """Decode some lines of a file; an error names the line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason} 0x{data[error.start]:02x})") from error


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}: invalid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested brackets
        raise DataError(f"{path}, line {first_line}: invalid JSON ({error})") from error


class Fields:
    """Typed access to the fields of one record; every complaint names the place and the field."""

    def __init__(self, where: str, fields: dict[str, Any], prefix: str = "") -> None:
        self.where = where
        self._fields = fields
        self._prefix = prefix

    def text(self, name: str) -> str:
        """A required field with text."""
        return self._checked_text(name, self._required(name, "text"))

    def optional_text(self, name: str) -> str | None:
        """Text, or None where the field is absent or null."""
        value = self._fields.get(name)
        return None if value is None else self._checked_text(name, value)

    def some_text(self, name: str) -> tuple[str, ...]:
        """A text as a list of one; an absent, null or blank text is an empty list."""
        value = self.optional_text(name)
        return (value,) if value and value.strip() else ()

    def texts(self, name: str, *, required: bool) -> tuple[str, ...]:
        """A list of texts; absent or null is an empty list unless ``required``."""
        value = self._required(name, "a list of text") if required else self._fields.get(name)
        if value is None and not required:
            return ()
        if not isinstance(value, list):
            raise self._wrong(name, "a list of text", value)
        return tuple(self._checked_text(f"{name}[{i}]", item) for i, item in enumerate(value))

    def answers(self, name: str) -> tuple[str, ...]:
        """A text, or nested lists of texts, as one flat list without blank texts; absent or null is an empty list."""
        if self.is_list(name):
            return tuple(text for texts in self.each(name) for text in texts)
        return self.some_text(name)

    def each(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The answers of each item of a list; a text counts as a list of one."""
        if not self.is_list(name):
            return (self.answers(name),)
        items = self._items(name)
        return tuple(items.answers(place) for place in items.names())

    def objects(self, name: str) -> tuple[Fields, ...]:
        """The fields of an object, or of each object in a list; absent or null is an empty list."""
        if self._fields.get(name) is None:
            return ()
        if not self.is_list(name):
            return (self.inside(name),)
        items = self._items(name)
        return tuple(items.inside(place) for place in items.names())

    def is_list(self, name: str) -> bool:
        return isinstance(self._fields.get(name), list)

    def names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    def _items(self, name: str) -> Fields:
        """The items of a list as fields, named by position."""
        return Fields(self.where, {f"{name}[{i}]": item for i, item in enumerate(self._fields[name])}, self._prefix)

    def template(self, question: str, subject: str) -> str:
        """The text of ``question`` with ``{}`` in place of the first occurrence of ``subject``, of whole words if any.

        Raises:
            NoEditError: the subject does not occur.
        """
        text, about = self.text(question), self.text(subject).strip()
        if not about or about not in text:
            raise NoEditError(f"{self.where}: field '{subject}' is {about!r}, which is not in {text!r}")
        word = re.search(rf"(?<!\w){re.escape(about)}(?!\w)", text)
        at = word.start() if word else text.index(about)
        return f"{text[:at]}{{}}{text[at + len(about) :]}"

    def optional_identifier(self, name: str) -> str | None:
        """Text or an integer, as text; None where absent or null."""
        value = self._fields.get(name)
        return None if value is None else self.identifier(name)

    def identifier(self, name: str) -> str:
        """Text or an integer, as text."""
        value = self._required(name, "text or an integer")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return self._checked_text(name, value)
        raise self._wrong(name, "text or an integer", value)

    def truth(self, name: str) -> bool:
        """True or false."""
        value = self._required(name, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def inside(self, name: str) -> Fields:
        """The fields of an object inside this one."""
        value = self._required(name, "an object")
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return Fields(self.where, value, f"{self._prefix}{name}.")

    def _required(self, name: str, expected: str) -> Any:
        if name not in self._fields:
            raise DataError(f"{self.where}: field '{self._prefix}{name}' is missing; expected {expected}")
        return self._fields[name]

    def _checked_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong(name, "text", value)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._wrong(name, "text without lone surrogates", value) from error
        return value

    def _wrong(self, name: str, expected: str, value: Any) -> DataError:
        shown = ascii(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return DataError(
            f"{self.where}: field '{self._prefix}{name}' must be {expected}, got {type(value).__name__} {shown}"
        )
