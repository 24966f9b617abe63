"""Rows of tables, one after the other in bounded memory; damaged rows come with what is wrong with them.

Prediction marks such a row and goes on; training refuses it.
"""

from __future__ import annotations

import decimal
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from datamux_jax.data.table_formats import ENDINGS, FORMATS, HEADERLESS, JsonLines
from datamux_jax.errors import InputError, choose


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      number: of the row, from 1; a header does not count.
      line: of the file at which it starts, from 1; of Parquet, the number of the row.
      values: column -> value, of the columns asked for; of a damaged row, those that can be read, with U+FFFD for what is no UTF-8.
      problem: what is wrong with it, such as "is not UTF-8 at byte 7 (0xff)"; "": nothing.
      broken: the problem is that of the row as a whole, so that its values tell it from others, and are good for nothing else.
    """

    number: int
    line: int
    values: dict[str, Any]
    problem: str
    broken: bool = False


class Table:
    """A table, open for reading once from start to end.

    Args:
      source: path of a file, or a binary stream such as `sys.stdin.buffer`.
      columns: name of each column that is wanted -> what it holds, a key of `KINDS`. Columns of a file without a header are
        numbers from "1" on; the column of lines of text is "text".
      file_format: key of `FORMATS`; "": by the ending of the path.
      header: TSV and CSV: the first row names the columns.
      optional: of `columns`, those that the first rows of JSON lines may all be without.
      named_by: column -> the flag or config key that names it, for errors.

    Attributes:
      names: all columns; of JSON lines, those of the first rows.
      size: of the file in bytes; 0 where it is not known.

    Raises:
      InputError: a file that cannot be read, an unknown format or column, a column that occurs twice, or a damaged header.
    """

    def __init__(
        self,
        source: str | Path | BinaryIO,
        columns: Mapping[str, str],
        *,
        file_format: str = "",
        header: bool = True,
        optional: Collection[str] = (),
        named_by: Mapping[str, str] = {},
    ) -> None:
        self._own = isinstance(source, str | Path)
        self.name = str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "the stream"))
        self._kinds = {column: KINDS[choose(KINDS, kind, "The kind of column")] for column, kind in columns.items()}
        kind = format_of(self.name, file_format)
        if not header and kind not in HEADERLESS:
            raise InputError(
                f"{self.name} is of format {kind!r}, but header is false, which is for {' and '.join(HEADERLESS)}. Leave it true."
            )
        self._handle = opened(source) if isinstance(source, str | Path) else source
        try:
            self.size = os.fstat(self._handle.fileno()).st_size if self._own else 0
            self._format = FORMATS[kind](self._handle, self.name, header)
            self.names = self._format.names
            self._check(optional, named_by)
        except BaseException:
            self.close()
            raise

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._format.position

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """The rows after the first `skip` ones, which are passed over without being taken apart (but for CSV)."""
        for number, (line, fields, problem, broken) in enumerate(self._format.read(self._kinds, skip), start=skip + 1):
            values: dict[str, Any] = {}
            for column, read in self._kinds.items():
                if column not in fields:
                    problem = problem or f"has no field {column!r}"
                    continue
                value, wrong = read(fields[column])
                if wrong:
                    problem = problem or f"has {wrong} in the column {column!r}"
                else:
                    values[column] = value
            yield Row(number, line, values, problem, broken)

    def good(self) -> Iterator[Row]:
        """The rows.

        Raises:
          InputError: at the first row that is damaged.
        """
        for row in self.rows():
            if row.problem:
                raise InputError(f"{self.name}, line {row.line}: the row {row.problem}. Correct the line, or take it out.")
            yield row

    def close(self) -> None:
        """Closes the file, if it was opened here."""
        if self._own:
            self._handle.close()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _check(self, optional: Collection[str], named_by: Mapping[str, str]) -> None:
        for column in self._kinds:
            found = self.names.count(column)
            # What the first rows do not have, later ones may: only of a column that every row needs is it an error.
            later = isinstance(self._format, JsonLines) and (column in optional or not self._format.sound)
            if found != 1 and not (later and not found):
                problem = f"has {found} columns named" if found else "has no column"
                raise InputError(
                    f"{self.name} {problem} {column!r}. Its columns are: {', '.join(self.names) or 'none, it is empty'}. Name one of "
                    + (f"them with {named_by[column]}" if column in named_by else "them")
                    + ", as the file writes it"
                    + (", or change the file." if found else "; without a header, a column is named by its number.")
                )


def format_of(name: str, file_format: str = "") -> str:
    """The format of a file, a key of `FORMATS`: the given one, or that of the ending of its name.

    Raises:
      InputError: there is no such format, or the ending says nothing.
    """
    if file_format:
        return choose(FORMATS, file_format, "The format")
    ending = Path(name).suffix.lower()
    if ending not in ENDINGS:
        raise InputError(
            f"The ending of {name} does not say what it is: {', '.join(ENDINGS)} do. Name the format: {', '.join(FORMATS)}."
        )
    return ENDINGS[ending]


def opened(path: str | Path) -> BinaryIO:
    """Raises InputError if the file cannot be opened."""
    try:
        return Path(path).expanduser().open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _text(value: Any) -> tuple[Any, str]:
    value, problem = _string(value)
    return value, problem or ("" if value.strip() else "no text")


def _string(value: Any) -> tuple[Any, str]:
    if value is None:
        return value, "no value"
    if not isinstance(value, str):
        return value, f"no text, but a value of type {type(value).__name__}"
    return value, "" if value.isascii() or value.encode("utf-8", "ignore").decode() == value else "a lone surrogate"


def _words(value: Any) -> tuple[Any, str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list):
        return value, "no value" if value is None else f"no list of words, but a value of type {type(value).__name__}"
    problem = next((wrong for _, wrong in map(_text, words) if wrong), "")
    return words, "a word with " + problem if problem else "" if words else "no word"


def _value(value: Any) -> tuple[Any, str]:
    if isinstance(value, str):
        return _text(value.strip())
    if isinstance(value, bool | int | float | decimal.Decimal):
        return str(value), ""
    return value, "no value" if value is None else f"a value of type {type(value).__name__}"


def _id(value: Any) -> tuple[Any, str]:
    """Parquet has dates, times and UUIDs, which name a row as well as a number does."""
    return _value(value) if value is None or isinstance(value, str | list | dict) else (str(value), "")


# What a column holds -> how a field is read: the value, and what is wrong with it ("": nothing).
#   text: text, not blank. string: text, may be blank. words: a list of words, or words between spaces.
#   value: a number, a truth value or a text without spaces around it, as a string. id: the same, or a date, a time or the like.
KINDS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "text": _text,
    "string": _string,
    "words": _words,
    "value": _value,
    "id": _id,
}
