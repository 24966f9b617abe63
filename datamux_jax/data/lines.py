"""Numbered lines of binary streams, read in bounded memory, and what is wrong with them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from datamux_jax.data.text_files import MARKS
from datamux_jax.errors import InputError

LONGEST = 1 << 22  # Bytes of a line, or of a record of CSV. What is longer is no row but damage.


class Line(NamedTuple):
    """A line: its number, from 1; its bytes; and what is wrong with it ("": nothing)."""

    number: int
    content: bytes
    problem: str = ""


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

    def __iter__(self) -> Iterator[Line]:
        blank = 0
        while line := self._ahead or self._handle.readline(LONGEST + 1):
            self._ahead = b""
            self.number += 1
            self.position += len(line)
            if not self._trailing and not line.strip():
                blank += 1
                continue
            for earlier in range(self.number - blank, self.number):
                yield Line(earlier, b"")
            blank = 0
            if len(line) <= LONGEST or line.endswith(b"\n"):
                yield Line(self.number, line.removesuffix(b"\n").removesuffix(b"\r"))
            else:
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._handle.readline(LONGEST)
                    self.position += len(rest)
                yield Line(self.number, b"", f"is a line of more than {LONGEST:,} bytes")


def decoded(content: bytes) -> tuple[str, str]:
    """The text, with U+FFFD for what is none, and what is wrong with it."""
    try:
        return content.decode(), ""
    except UnicodeDecodeError as error:
        return content.decode(errors="replace"), not_utf8(error)


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no text."""
    return f"is not UTF-8 at byte {error.start + 1} (0x{error.object[error.start]:02x})"
