"""Texts to token ids: bytes, or the subwords of a vocabulary that is published or trained here.

`open_tokenizer` finds the tokenizer that a config names; `load` reads what `Tokenizer.save` wrote, and published files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tokenizers

from datamux_jax import packaged, workdir
from datamux_jax.data import cache, subword_models
from datamux_jax.data.frames import Frame, framed, tokens_behind
from datamux_jax.errors import InputError
from datamux_jax.families import FAMILIES, SpecialTokens, published_tokens
from datamux_jax.progress import Progress

if TYPE_CHECKING:
    from datamux_jax.data.corpus import Corpus

BYTES = "bytes"
BYTES_FILE = "bytes.json"
SUBWORD_FILE = "tokenizer.json"
RUN_FOLDER = "tokenizer"  # Of a run's folder.
NAMES = (("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"), ("<pad>", "<s>", "</s>", "<mask>", "<unk>"))
CACHE_VERSION = 1
TRAINING_BYTES = 10**9  # Text that a tokenizer is trained on; of more, every so-manieth document.
BLOCK_TEXTS = 1024  # Texts that the library encodes at once; its results take some hundred bytes a token.

# Unless this is set, older versions of the library (0.22) warn on stderr when a process forks after it ran in parallel. With "true"
# a fork, where the library's threads are gone, would wait for them forever.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


class Tokenizer(Protocol):
    """What encodes texts. Tokenizers with equal content are equal, and have equal hashes and fingerprints."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of everything that decides how texts are encoded."""

    def special_tokens(self, num_instances: int, family: str) -> tuple[SpecialTokens, int]:
        """The special ids, and the vocabulary size with room for the tokens of the index demultiplexer's prefix.

        Args:
          num_instances: `N`.
          family: key of `FAMILIES`; its published vocabulary has room for these tokens by itself.
        """

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and mask, both `[n, length]` int32, and whether the end was cut off, `[n]` bool.

        The mask is 1 at real tokens, special ones included.
        """

    @property
    def frame(self) -> Frame:
        """The special tokens of a row."""

    def pieces(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        """The ids of each text, without special tokens."""

    def word_pieces(self, words: Sequence[str]) -> Iterator[Sequence[int]]:
        """The ids of words that stand in a text, each on its own; a word may have none."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as `[CLS] ... [SEP]`, int32, as long as it is."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids; padding, [CLS], [SEP], [MASK] and ids outside of the vocabulary are left out."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer into a folder, which `load` reads."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes after four special tokens: no vocabulary to train, nothing out of vocabulary.

    A row is `[CLS] byte byte ...`, cut or padded to the length asked for.
    """

    pad_id: int = 0
    cls_id: int = 1
    sep_id: int = 2
    mask_id: int = 3
    first_byte_id: int = 4

    @property
    def vocab_size(self) -> int:
        return self.first_byte_id + 256

    @functools.cached_property
    def fingerprint(self) -> str:
        return cache.digest(BYTES, dataclasses.asdict(self))

    def special_tokens(self, num_instances: int, family: str) -> tuple[SpecialTokens, int]:
        """As `Tokenizer.special_tokens`; no family publishes a vocabulary of bytes."""
        return tokens_behind(self.vocab_size, num_instances, self.pad_id, self.cls_id, self.sep_id, self.mask_id)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and mask, both `[n, length]` int32, and whether the end was cut off, `[n]` bool.

        The mask is 1 at real tokens, `[CLS]` included. There is no `[SEP]`.
        """
        return framed((self._ids(text) for text in texts), (self.cls_id,), (), length, self.pad_id)

    @property
    def frame(self) -> Frame:
        return Frame((self.cls_id,), (self.sep_id,), (), self.pad_id, tuple(self._ids(" ").tolist()))

    def pieces(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        return (self._ids(text).tolist() for text in texts)

    word_pieces = pieces

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.concatenate([[self.cls_id], self._ids(text), [self.sep_id]], dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids, specials left out; bytes that are not UTF-8 become U+FFFD."""
        codes = [int(i) - self.first_byte_id for i in ids if 0 <= int(i) - self.first_byte_id < 256]
        return bytes(codes).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(folder / BYTES_FILE, dataclasses.asdict(self))

    def _ids(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32) + self.first_byte_id


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer:
    """The pieces of words of a `tokenizer.json`; `parse` makes one.

    A row is `[CLS] piece piece ... [SEP]`, whatever the file says about special tokens, truncation and padding. Special tokens that
    are written out in a text, such as "[MASK]", are special there too.

    Attributes:
      content: the `tokenizer.json`, compact.
    """

    content: str = dataclasses.field(repr=False)

    @classmethod
    def parse(cls, content: str, origin: Any) -> SubwordTokenizer:
        """Reads the content of a `tokenizer.json` that came from `origin`.

        Raises:
          InputError: it is none, or lacks a special token.
        """
        try:
            fields = json.loads(content)
            fields |= {"truncation": None, "padding": None}
            tokenizer = cls(json.dumps(fields, ensure_ascii=False, separators=(",", ":")))
            known = tokenizer._library.get_vocab()
        except Exception as error:  # The library has no exception of its own.
            raise InputError(
                f"The tokenizer {origin} cannot be read: {error}. Give a tokenizer.json of the tokenizers library, a vocab.txt, or a "
                "folder with one of them."
            ) from error
        missing = min(([name for name in names if name not in known] for names in NAMES), key=len)
        if missing:
            raise InputError(
                f"The tokenizer {origin} has no {', '.join(missing)}. It needs {', '.join(NAMES[0])}, or {', '.join(NAMES[1])}; add "
                "them, or choose another one."
            )
        return tokenizer

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.content)

    @functools.cached_property
    def _special_ids(self) -> tuple[int, int, int, int]:
        """Of padding, [CLS], [SEP] and [MASK]."""
        vocabulary = self._library.get_vocab()
        pad, cls, sep, mask, _ = next(names for names in NAMES if all(name in vocabulary for name in names))
        return vocabulary[pad], vocabulary[cls], vocabulary[sep], vocabulary[mask]

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._library.get_vocab().values())  # There may be holes.

    @functools.cached_property
    def fingerprint(self) -> str:
        return cache.digest("subword", self.content)

    def special_tokens(self, num_instances: int, family: str) -> tuple[SpecialTokens, int]:
        """As `Tokenizer.special_tokens`: those of the family's published vocabulary if this is it, else behind the vocabulary."""
        size = FAMILIES[family].vocab_size
        published = published_tokens(family, size, num_instances)
        if (self.vocab_size, *self._special_ids) == (size, published.pad, published.cls, published.sep, published.mask):
            return published, size
        return tokens_behind(self.vocab_size, num_instances, *self._special_ids)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and mask, both `[n, length]` int32, and whether the end was cut off, `[n]` bool.

        The mask is 1 at real tokens. A text is cut so that its `[SEP]` stays.

        Raises:
          InputError: `length` has no room for a piece between [CLS] and [SEP].
        """
        if length < 3:
            raise InputError(
                f"data.length = {length}, but a text needs at least 3 positions: [CLS], one token and [SEP]. Raise it."
            )
        pad, cls, sep, _ = self._special_ids
        return framed(self.pieces(texts), (cls,), (sep,), length, pad)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        _, cls, sep, _ = self._special_ids
        return [np.array([cls, *ids, sep], np.int32) for ids in self.pieces(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind token ids; padding, [CLS], [SEP], [MASK] and ids outside of the vocabulary are left out."""
        shown = [int(i) for i in ids if i >= 0 and i not in self._special_ids]
        return self._library.decode(shown, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_text(folder / SUBWORD_FILE, self.content)

    @functools.cached_property
    def frame(self) -> Frame:
        pad, cls, sep, _ = self._special_ids
        roberta = NAMES[1][0] in self._library.get_vocab()
        return Frame((cls,), (sep, sep) if roberta else (sep,), (sep,), pad)

    def pieces(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for start in range(0, len(texts), BLOCK_TEXTS):
            # The library refuses lone surrogates.
            block = [text.encode("utf-8", "replace").decode() for text in texts[start : start + BLOCK_TEXTS]]
            for encoding in self._library.encode_batch_fast(block, add_special_tokens=False):
                yield encoding.ids

    def word_pieces(self, words: Sequence[str]) -> Iterator[Sequence[int]]:
        # Byte-level vocabularies tell a word by the space before it.
        before = " " if "ByteLevel" in json.dumps(json.loads(self.content)["pre_tokenizer"]) else ""
        return self.pieces([before + word for word in words])


def open_tokenizer(name: str, data: Any, corpus: Corpus | None = None) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
      name: "bytes"; "wordpiece" or "bpe", trained on the training split of `corpus` unless the cache has it; a key of
        `packaged.PACKAGES`; or what `load` reads.
      data: `config.data`; reads `vocab_size`, `lowercase` and `cache`.
      corpus: running text; None if the data source has none.

    Raises:
      InputError: a name that is neither a kind nor a path, a file that cannot be read, or nothing to train on.
    """
    if name == BYTES:
        return ByteTokenizer()
    if name not in subword_models.TRAINERS:
        path = packaged.encoder(name)
        if not name or not path.exists():
            raise InputError(
                f"data.tokenizer = {name!r} does not exist. Choose {BYTES}, or {' or '.join(subword_models.TRAINERS)} to train one on "
                f"running text, or {' or '.join(packaged.PACKAGES)}, or give the path of a tokenizer.json, of a vocab.txt, or of a "
                "folder with one, such as a run's."
            )
        return load(path, lowercase=data.lowercase)
    if corpus is None:
        raise InputError(
            f"data.tokenizer = {name!r} is trained on running text, but data.source = {data.source!r} has none. Choose {BYTES}, or "
            "give the path of a trained tokenizer, such as the folder of a pre-training run."
        )
    key = cache.digest(CACHE_VERSION, corpus.fingerprint, name, data.vocab_size, data.lowercase)
    entry = cache.folder(data) / "tokenizers" / key
    if not (entry / SUBWORD_FILE).is_file():
        with cache.claimed(entry, "training this tokenizer"):
            if not (entry / SUBWORD_FILE).is_file():
                _train(name, data, corpus, entry)
    return load(entry)


def load(path: str | Path, *, lowercase: bool = True) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a `tokenizer.json` or a `vocab.txt`; or a folder with one of them, with `vocab.json` and `merges.txt`, or with what
        `Tokenizer.save` wrote; or the folder of a run.
      lowercase: of a `vocab.txt` without a `tokenizer_config.json`: lower-case all text.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    given = Path(path).expanduser()
    places = [given, *(place / name for place in (given, given / RUN_FOLDER) for name in READERS)]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        problem = "holds none" if given.is_dir() else "does not exist"
        raise InputError(
            f"The tokenizer {given} {problem}. Give a tokenizer.json, a vocab.txt, or a folder with one of them, with vocab.json and "
            "merges.txt, or of a run."
        )
    kind = file.name if file.name in READERS else "vocab.txt" if file.suffix == ".txt" else SUBWORD_FILE
    try:
        return READERS[kind](file, lowercase)
    except InputError:
        raise
    except Exception as error:  # The library has no exception of its own.
        raise InputError(f"The tokenizer {file} cannot be read: {error}. Restore the file, or choose another one.") from error


READERS: dict[str, Callable[[Path, bool], Tokenizer]] = {
    SUBWORD_FILE: lambda file, _: SubwordTokenizer.parse(file.read_text(encoding="utf-8"), file),
    "vocab.txt": lambda file, lowercase: SubwordTokenizer.parse(subword_models.read_vocab_txt(file, lowercase), file),
    "vocab.json": lambda file, _: SubwordTokenizer.parse(subword_models.read_merges(file), file),
    BYTES_FILE: lambda file, _: ByteTokenizer(**workdir.read_json(file)),
}


def _train(kind: str, data: Any, corpus: Corpus, entry: Path) -> None:
    """Trains a tokenizer into its entry in the cache."""
    split = corpus.splits[0]
    step = -(-corpus.size(split) // TRAINING_BYTES) or 1
    print(f"Training a {kind} tokenizer of {data.vocab_size:,} tokens on the split {split!r}.", flush=True)

    def texts() -> Iterator[str]:
        extent = corpus.extent(split)
        with contextlib.closing(Progress(f"Reading for the tokenizer ({corpus.unit})", extent)) as progress:
            for document in itertools.islice(corpus.documents(split), 0, None, step):
                yield document.text
                progress.update(min(document.position, extent - 1))  # Reaching the total prints a line at once.

    tokenizer = SubwordTokenizer.parse(subword_models.train(kind, texts, data.vocab_size, data.lowercase), entry)
    meta = {"kind": kind, "vocab_size": tokenizer.vocab_size, "lowercase": data.lowercase, "source": corpus.reader.description}
    with cache.writing(entry):
        workdir.write_json(entry / cache.META, meta)
        tokenizer.save(entry)  # Last: where this file is, the entry is complete.
