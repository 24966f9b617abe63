"""Formats of tables, read record by record in bounded memory: TSV, CSV, JSON lines, Parquet, and lines of text. Table `FORMATS`.

TSV is that of GLUE: quotes are characters like any other. CSV is that of RFC 4180: quoted fields may hold commas, quotes, line ends.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from datamux_jax.data.text_files import MARKS
from datamux_jax.errors import InputError

LONGEST = 1 << 22  # Bytes of a line, characters of a CSV field. What is longer is no row but damage, such as a quote left open.
HEAD = 100  # First records, which give the columns of a file without a header: one of them may be damaged.
BATCH = 256  # Records of a Parquet file that are in memory at once.
TEXT_COLUMN = "text"  # Of lines of text.


class Record(NamedTuple):
    """A record: the line it starts at, its fields by column, and what is wrong with it ("": nothing)."""

    line: int
    fields: dict[str, Any]
    problem: str = ""


class Format(Protocol):
    """An open table.

    Attributes:
      names: of its columns.
      position: bytes read so far; of Parquet, the share of its records that was read, in bytes.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def position(self) -> int: ...

    def read(self, columns: Collection[str], skip: int) -> Iterator[Record]:
        """The records after the first `skip` ones, with those of `columns` that they have; once only."""


class Lines:
    """Numbered lines of a binary stream, without their ends and without a byte-order mark.

    Args:
      handle: the stream, which need not be seekable.
      name: of it, for errors.
      trailing: blank lines at the end of the stream are lines, too.

    Raises:
      InputError: it starts with a byte-order mark of UTF-16 or UTF-32.
    """

    def __init__(self, handle: BinaryIO, name: str, trailing: bool = False) -> None:
        self._handle, self._trailing = handle, trailing
        self.number = self.position = 0
        self._ahead = handle.readline(LONGEST + 1)
        mark, encoding = next((pair for pair in MARKS if self._ahead.startswith(pair[0])), (b"", ""))
        if mark and mark != codecs.BOM_UTF8:
            raise InputError(
                f"{name} is {encoding.upper()}, but tables are read as UTF-8. Convert it, for instance with iconv -f UTF-16 -t UTF-8."
            )
        self._ahead = self._ahead[len(mark) :]
        self.position = len(mark)

    def __iter__(self) -> Iterator[tuple[int, bytes, str]]:
        """Number of the line, from 1; its bytes; and what is wrong with it ("": nothing)."""
        blank = 0
        while line := self._ahead or self._handle.readline(LONGEST + 1):
            self._ahead = b""
            self.number += 1
            self.position += len(line)
            if not self._trailing and not line.strip():
                blank += 1
                continue
            for earlier in range(self.number - blank, self.number):
                yield earlier, b"", ""
            blank = 0
            if len(line) <= LONGEST or line.endswith(b"\n"):
                yield self.number, line.removesuffix(b"\n").removesuffix(b"\r"), ""
            else:
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._handle.readline(LONGEST)
                    self.position += len(rest)
                yield self.number, b"", f"is a line of more than {LONGEST:,} bytes"


class _OfLines:
    """What the formats of text have in common: the lines, and the first records, read to know the columns."""

    def __init__(self, handle: BinaryIO, name: str, header: bool) -> None:
        self.lines = Lines(handle, name, trailing=self.trailing)
        self._records = self.records()
        self.names = self.columns(name, header)

    trailing = False

    @property
    def position(self) -> int:
        return self.lines.position

    def records(self) -> Iterator[tuple[int, Any, str]]:
        """Line, content and problem of each record."""
        return iter(self.lines)

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        """The names of the columns."""
        raise NotImplementedError

    def fields(self, content: Any) -> tuple[dict[str, Any], str]:
        """The fields of a record by column, and what is wrong with it."""
        raise NotImplementedError

    def head(self) -> list[Any]:
        """The contents of the first records, which stay to be read."""
        first = list(itertools.islice(self._records, HEAD))
        self._records = itertools.chain(first, self._records)
        return [content for _, content, problem in first if not problem]

    def read(self, columns: Collection[str], skip: int) -> Iterator[Record]:
        for line, content, problem in itertools.islice(self._records, skip, None):
            fields: dict[str, Any] = {}
            if not problem:
                fields, problem = self.fields(content)
            yield Record(line, {name: fields[name] for name in columns if name in fields}, problem)


class Text(_OfLines):
    """Lines of text: one column, `TEXT_COLUMN`."""

    trailing = True

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        return (TEXT_COLUMN,)

    def fields(self, content: bytes) -> tuple[dict[str, Any], str]:
        text, problem = decoded(content)
        return {TEXT_COLUMN: text}, problem


class JsonLines(_OfLines):
    """An object a line; the columns are the keys of the first ones."""

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for content in self.head() for key in self.fields(content)[0]))

    def fields(self, content: bytes) -> tuple[dict[str, Any], str]:
        text, problem = decoded(content)
        if problem:
            return {}, problem
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return {}, f"is no JSON: {error}"
        return (value, "") if isinstance(value, dict) else ({}, f"is no JSON object, but of type {type(value).__name__}")


class Delimited(_OfLines):
    """Fields in lines; the columns are named by the first record, or, without a header, numbered from 1."""

    wanted = 0  # Fields of a record where a header says how many.

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        if not header:
            widths = [len(self.split(content)[0]) for content in self.head()]
            return tuple(map(str, range(1, max(widths, default=0) + 1)))
        _, content, problem = next(self._records, (1, b"", "is missing: the file is empty"))
        names, problem = ([], problem) if problem else self.split(content)
        if problem:
            raise InputError(f"The header of {name} {problem}. Repair the file; or, if it has no header, set header to false.")
        self.wanted = len(names)
        return tuple(names)

    def split(self, content: Any) -> tuple[list[str], str]:
        """The fields of a record in order, and what is wrong with it."""
        raise NotImplementedError

    def fields(self, content: Any) -> tuple[dict[str, Any], str]:
        fields, problem = self.split(content)
        if not problem and self.wanted and len(fields) != self.wanted:
            return {}, f"has {len(fields)} fields, but the header names {self.wanted}"
        return dict(zip(self.names, fields, strict=False)), problem


class Tsv(Delimited):
    """Fields between tabs."""

    def split(self, content: bytes) -> tuple[list[str], str]:
        text, problem = decoded(content)
        return text.split("\t"), problem


class Csv(Delimited):
    """Fields between commas, as RFC 4180 has them."""

    def records(self) -> Iterator[tuple[int, Any, str]]:
        problems: list[str] = []

        def texts() -> Iterator[str]:
            for _, content, problem in self.lines:
                text, bad = decoded(content)
                problems.extend(filter(None, (problem, bad)))
                yield text + "\n"

        csv.field_size_limit(LONGEST)
        reader = csv.reader(texts(), strict=True)
        before = 0
        while True:
            fields: list[str] = []
            problems.clear()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problems.append(f"is no CSV: {error}")
            lines = f" (lines {before + 1} to {reader.line_num})" if reader.line_num > before + 1 else ""
            yield before + 1, fields, problems[0] + lines if problems else ""
            before = reader.line_num

    def split(self, content: list[str]) -> tuple[list[str], str]:
        return content, ""


class Parquet:
    """An Apache Parquet file; needs the extra `parquet`."""

    def __init__(self, handle: BinaryIO, name: str, header: bool) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                f"{name} is Parquet, which needs pyarrow. Run pip install 'datamux_jax[parquet]', or write the table as TSV."
            ) from error
        if not handle.seekable():
            raise InputError(f"{name} is a stream, but Parquet is read from its end. Give the path of a file.")
        self._size = handle.seek(0, os.SEEK_END)
        self._name, self._errors = name, (pyarrow.ArrowException, OSError)
        try:
            self._file = pyarrow.parquet.ParquetFile(handle)
        except self._errors as error:
            raise InputError(f"{name} is no Parquet: {error}. Restore the file, or say which format it has.") from error
        self.names = tuple(self._file.schema_arrow.names)
        self._done = 0

    @property
    def position(self) -> int:
        return self._size * self._done // max(self._file.metadata.num_rows, 1)

    def read(self, columns: Collection[str], skip: int) -> Iterator[Record]:
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        first = 0
        while first < len(groups) and self._done + groups[first] <= skip:
            self._done += groups[first]
            first += 1
        try:
            for batch in self._file.iter_batches(BATCH, list(range(first, len(groups))), list(columns)):
                for row in range(batch.num_rows):
                    self._done += 1
                    if self._done > skip:
                        yield self._record(batch, row)
        except self._errors as error:
            raise InputError(
                f"{self._name} cannot be read after record {self._done}: {error}. Restore the file, or write it anew."
            ) from error

    def _record(self, batch: Any, row: int) -> Record:
        fields, problem = {}, ""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                fields[name] = _strings(column[row].as_py())
            except UnicodeDecodeError as error:
                problem = _not_utf8(error)
        return Record(self._done, fields, problem)


def decoded(content: bytes) -> tuple[str, str]:
    """The text, with U+FFFD for what is none, and what is wrong with it."""
    try:
        return content.decode(), ""
    except UnicodeDecodeError as error:
        return content.decode(errors="replace"), _not_utf8(error)


def _strings(value: Any) -> Any:
    """A value of Parquet whose texts, also those of a list, may be stored as bytes."""
    if isinstance(value, list):
        return [_strings(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})"


# Name -> class that opens a binary stream: the stream, its name for errors, and whether it has a header (TSV and CSV only).
FORMATS: dict[str, Callable[[BinaryIO, str, bool], Format]] = {
    "tsv": Tsv,
    "csv": Csv,
    "jsonl": JsonLines,
    "parquet": Parquet,
    "text": Text,
}
HEADERLESS = ("tsv", "csv")
ENDINGS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
