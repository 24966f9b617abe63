"""Formats of tables, read record by record in bounded memory: TSV, CSV, JSON lines, Parquet, and lines of text. Table `FORMATS`.

TSV is that of GLUE: quotes are characters like any other. CSV is that of RFC 4180: quoted fields may hold commas, quotes, line ends.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from datamux_jax.data import lines
from datamux_jax.data.lines import Line, Lines, decoded, not_utf8
from datamux_jax.errors import InputError

HEAD = 100  # First records, which give the columns of a file without a header: one of them may be damaged.
BATCH = 256  # Records of a Parquet file that are in memory at once.
BUFFER = 1 << 20  # Bytes of a column of it that are read at once.
TEXT_COLUMN = "text"  # Of lines of text.


class Record(NamedTuple):
    """A record.

    Attributes:
      line: that it starts at.
      fields: by column; of a broken record those that can be read, with U+FFFD for what is no UTF-8, to tell it from others.
      problem: what is wrong with it; "": nothing.
      broken: the problem is that of the record as a whole, so that none of its fields can be relied on.
    """

    line: int
    fields: dict[str, Any]
    problem: str = ""
    broken: bool = False


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
        """The fields of a record by column, as far as it can be read, and what is wrong with it."""
        raise NotImplementedError

    def head(self) -> list[tuple[Any, str]]:
        """Contents and problems of the first records, which stay to be read."""
        first = list(itertools.islice(self._records, HEAD))
        self._records = itertools.chain(first, self._records)
        return [(content, problem) for _, content, problem in first]

    def read(self, columns: Collection[str], skip: int) -> Iterator[Record]:
        for line, content, problem in itertools.islice(self._records, skip, None):
            fields, wrong = self.fields(content)
            problem = problem or wrong
            yield Record(line, {name: fields[name] for name in columns if name in fields}, problem, bool(problem))


class Text(_OfLines):
    """Lines of text: one column, `TEXT_COLUMN`."""

    trailing = True

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        return (TEXT_COLUMN,)

    def fields(self, content: bytes) -> tuple[dict[str, Any], str]:
        text, problem = decoded(content)
        return {TEXT_COLUMN: text}, problem


class JsonLines(_OfLines):
    """An object a line; the columns are the keys of the first ones.

    Attributes:
      sound: all of the first lines are objects, so that what none of them has, a file of such rows does not have either.
    """

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        first = [(problem, *self.fields(content)) for content, problem in self.head()]
        self.sound = not any(problem or wrong for problem, _, wrong in first)
        return tuple(dict.fromkeys(key for _, fields, _ in first for key in fields))

    def fields(self, content: bytes) -> tuple[dict[str, Any], str]:
        text, problem = decoded(content)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return {}, problem or f"is no JSON: {error}"
        if not isinstance(value, dict):
            return {}, problem or f"is no JSON object, but of type {type(value).__name__}"
        return value, problem


class Delimited(_OfLines):
    """Fields in lines; the columns are named by the first record, or, without a header, numbered from 1."""

    wanted = 0  # Fields of a record where a header says how many.

    def columns(self, name: str, header: bool) -> tuple[str, ...]:
        if not header:
            widths = [len(self.split(content)[0]) for content, problem in self.head() if not problem]
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
        if self.wanted and len(fields) != self.wanted:
            problem = problem or f"has {len(fields)} fields, but the header names {self.wanted}"
            fields = fields if len(fields) < self.wanted else []  # With surplus ones nobody knows which is which.
        return dict(zip(self.names, fields, strict=False)), problem


class Tsv(Delimited):
    """Fields between tabs."""

    def split(self, content: bytes) -> tuple[list[str], str]:
        text, problem = decoded(content)
        return text.split("\t"), problem


class Csv(Delimited):
    """Fields between commas, as RFC 4180 has them."""

    def records(self) -> Iterator[tuple[int, Any, str]]:
        """As for all formats. Of a record that cannot be read, the first line alone is damaged, and the lines behind it are read anew:
        a quote that is never closed, or closed where another one opens, costs its own row, not those behind it."""
        source = iter(self.lines)
        again: collections.deque[Line] = collections.deque()
        while True:
            line = again.popleft() if again else next(source, None)
            if line is None:
                return
            text, wrong = decoded(line.content)
            if '"' not in text and "\r" not in text:  # Nearly all lines, read without a parser.
                yield line.number, text.split(",") if text else [], line.problem or wrong
                continue
            again.appendleft(line)
            taken: list[Line] = []
            fields, problem = self._parse(source, again, taken)
            first, last = taken[0], taken[-1]
            if not problem and last is not first and self.wanted not in (0, len(fields)):
                problem = (
                    f"is no CSV: a quote is open until line {last.number}, which makes {len(fields)} fields, not {self.wanted}"
                )
            if problem:
                again.extendleft(reversed(taken[1:]))
                yield first.number, _before_quotes(first), first.problem or decoded(first.content)[1] or problem
                continue
            problem = next(filter(None, (line.problem or decoded(line.content)[1] for line in taken)), "")
            where = f" (lines {first.number} to {last.number})" if problem and last is not first else ""
            yield first.number, fields, problem + where

    def _parse(self, source: Iterator[Line], again: collections.deque[Line], taken: list[Line]) -> tuple[list[str], str]:
        """The fields of a record, and what is wrong with it; `taken` gets its lines, those of `again` first."""

        def texts() -> Iterator[str]:
            size = 0
            while line := again.popleft() if again else next(source, None):
                taken.append(line)
                size += len(line.content) + (len(taken) > 1)  # The end of the line before.
                if size > lines.LONGEST:
                    raise csv.Error(f"a quote is open for more than {lines.LONGEST:,} bytes")
                yield decoded(line.content)[0] + "\n"

        csv.field_size_limit(2 * lines.LONGEST)  # Never reached: a record is not that long.
        try:
            return next(csv.reader(texts(), strict=True), []), ""
        except csv.Error as error:
            return [], f"is no CSV: {error}"

    def split(self, content: list[str]) -> tuple[list[str], str]:
        return content, ""


def _before_quotes(line: Line) -> list[str]:
    """The fields before the first quote of a damaged line of CSV."""
    before, quote, _ = decoded(line.content)[0].partition('"')
    return before.split(",")[:-1] if quote else []


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
            # By default all bytes of a row group are read at once, and a file may have a single one.
            self._file = pyarrow.parquet.ParquetFile(handle, pre_buffer=False, buffer_size=BUFFER)
        except self._errors as error:
            raise InputError(f"{name} is no Parquet: {error}. Restore the file, or say which format it has.") from error
        self.names = tuple(self._file.schema_arrow.names)
        self._text = pyarrow.string()
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
                problem = not_utf8(error)
            except ValueError:  # Of a time in nanoseconds, which Python has no type for.
                fields[name] = str(column[row].cast(self._text))
        return Record(self._done, fields, problem)


def _strings(value: Any) -> Any:
    """A value of Parquet whose texts, also those of a list, may be stored as bytes."""
    if isinstance(value, list):
        return [_strings(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


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
