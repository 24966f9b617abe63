"""Running text for pre-training: documents in a fixed order, in splits. Table `CORPORA`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from datamux_jax.data import cache, text_files, tfds_text
from datamux_jax.errors import InputError, choose

HELD_OUT = "validation"


class Document(NamedTuple):
    """A document, and where it stood.

    Attributes:
      number: its number among all documents of the source's split, from 0.
      text: never empty.
      position: how much of the source's split has been read once it is used up, in the corpus's `unit`.
    """

    number: int
    text: str
    position: int


class Reader(Protocol):
    """A source of running text, with the splits that it has by itself.

    Attributes:
      fingerprint: hash of the content, and of how it is cut into documents.
      description: what it is, for people; JSON.
      unit: what positions and sizes count, such as "kB".
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def description(self) -> Mapping[str, Any]: ...
    @property
    def unit(self) -> str: ...

    def extent(self, split: str) -> int:
        """Size of a split, in `unit`."""

    def size(self, split: str) -> int:
        """Size of a split in bytes, roughly."""

    def read(self, split: str, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str, int]]:
        """The `Document` fields of those from number `start` on whose number is wanted, in order, in bounded memory."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Which documents of a source's split make up a split of the corpus.

    Attributes:
      split: of the source.
      every: every how-manieth document is held out; 0 for none.
      held_out: the part is what is held out; False: all others.
    """

    split: str
    every: int = 0
    held_out: bool = False

    def has(self, number: int) -> bool:
        """Whether the document `number` of the source's split belongs here."""
        return not self.every or (number % self.every == self.every - 1) == self.held_out


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Running text in one or two splits; see `open_corpus`.

    Attributes:
      reader: the source.
      parts: name of a split -> its documents; the training split comes first.
    """

    reader: Reader
    parts: Mapping[str, Part]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which documents there are, in which split and order."""
        parts = {name: dataclasses.astuple(part) for name, part in self.parts.items()}
        return cache.digest(self.reader.fingerprint, parts)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; the training split comes first."""
        return tuple(self.parts)

    @property
    def unit(self) -> str:
        """What positions and `extent` count."""
        return self.reader.unit

    def extent(self, split: str) -> int:
        """Size of the source's split that `split` is a part of, in `unit`: the end of the documents' positions."""
        return self.reader.extent(self.parts[split].split)

    def size(self, split: str) -> int:
        """The same in bytes, roughly."""
        return self.reader.size(self.parts[split].split)

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """The documents of a split from number `start` on, in order, in bounded memory.

        Raises:
          InputError: there are none at all (`start` is 0), a file has changed since the corpus was opened, or a document is too
            long.
        """
        part = self.parts[split]
        none = start == 0
        for fields in self.reader.read(part.split, start, part.has):
            none = False
            yield Document(*fields)
        if none and part.held_out:
            raise InputError(
                f"The split {split!r} is empty: one document in {part.every} is held out for it (data.validation_share), and the "
                "text has fewer (in text files a blank line ends one). Raise data.validation_share; or set it to 0 for no such split, "
                "and eval.split to 'train'; or give more text."
            )
        if none:
            raise InputError(
                f"The split {split!r} of the running text {self.reader.description} has no document with any text. Check data.path "
                "and data.name, and the names of the splits."
            )


# Name -> reader of the data config and the names of the splits that are used.
CORPORA: dict[str, Callable[[Any, tuple[str, ...]], Reader]] = {"files": text_files.TextFiles, "tfds": tfds_text.TfdsText}


def open_corpus(data: Any) -> Corpus:
    """The running text that `config.data` names.

    The training split is named `data.train_split`. The split to score is `data.validation_split`; if that is "", every k-th
    document of the training split is held out as split "validation", with k = 1 / `data.validation_share`, and a share of 0 makes
    no such split.

    Args:
      data: `config.data`, with `source` a key of `CORPORA`.

    Returns:
      The corpus. Text files have all been read once then (unless the cache remembers them), and are known to be readable.

    Raises:
      InputError: no such source, file, data set, split or feature; text that cannot be read; or a share outside 0 to 0.5.
    """
    reader = CORPORA[choose(CORPORA, data.source, "Running text from data.source =")]
    if not 0 <= data.validation_share <= 0.5:
        raise InputError(
            f"data.validation_share = {data.validation_share} is no share of the documents to hold out. Choose a number from 0, for "
            "none, to 0.5."
        )
    train = data.train_split
    if data.validation_split:
        parts = {train: Part(train), data.validation_split: Part(data.validation_split)}
    elif data.validation_share == 0:
        parts = {train: Part(train)}
    elif train == HELD_OUT:
        raise InputError(
            f"data.train_split = {train!r} is also the name of the split that is held out. Set data.validation_split, or "
            "data.validation_share = 0 for no such split."
        )
    else:
        every = round(1 / data.validation_share)
        parts = {train: Part(train, every), HELD_OUT: Part(train, every, held_out=True)}
    return Corpus(reader(data, tuple(dict.fromkeys(part.split for part in parts.values()))), parts)
