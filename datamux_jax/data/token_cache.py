"""Running text as token ids, made once and kept in the cache.

An entry is a file of ids for each split, documents as `[CLS] ... [SEP]` one after the other, and `meta.json`, which says what they
are, for people too, and how far they are done. The files only grow, and `meta.json` is replaced after every block, when the block
is safely on the disk; so tokenising can be killed at any moment and goes on after the last block.
"""

from __future__ import annotations

import contextlib
import json
import os
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax import workdir
from datamux_jax.data import cache
from datamux_jax.data.corpus import Corpus, Document
from datamux_jax.data.tokenizers import Tokenizer
from datamux_jax.errors import InputError
from datamux_jax.progress import Progress

VERSION = 1
BLOCK_CHARACTERS = 1 << 22  # A second or two of work.


def tokenised(data: Any, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The token ids of running text, from the cache, or into it first.

    Of several processes on a machine one does the work; the others wait for it, and say so.

    Args:
      data: `config.data`; reads `cache`.
      corpus: the running text.
      tokenizer: what encodes it.

    Returns:
      For each split of the corpus a read-only array `[tokens]`, mapped from its file: all documents as `[CLS] ... [SEP]`, in order;
      uint16 if the vocabulary has at most 65,536 tokens, else uint32.

    Raises:
      InputError: a split without documents, text that cannot be read, or a cache that cannot be written.
    """
    entry = cache.folder(data) / "tokens" / cache.digest(VERSION, corpus.fingerprint, tokenizer.fingerprint)
    arrays = _opened(entry)
    if arrays is None:
        with cache.claimed(entry, "tokenising this text"):
            _tokenise(entry, corpus, tokenizer)  # Nothing is left to do if another process did it meanwhile.
            arrays = _opened(entry)
    if arrays is None:
        raise InputError(
            f"The tokenised text in {entry} changed while it was opened. Run the same command again; it makes up what is missing."
        )
    return arrays


def chunks(tokens: np.ndarray, length: int) -> np.ndarray:
    """Consecutive pieces of `length` tokens, `[n, length]`, as a view; the rest that fills no piece is left out.

    Args:
      tokens: `[tokens]`.
      length: `L`.

    Raises:
      InputError: there are fewer than `length` tokens.
    """
    count = len(tokens) // length
    if not count:
        raise InputError(
            f"data.length = {length}, but a split of the running text has {len(tokens)} tokens in all, less than one row. Lower "
            "data.length, or give more text (for the held-out split: raise data.validation_share)."
        )
    return tokens[: count * length].reshape(count, length)


def _opened(entry: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a complete entry; None if it is not there, not complete, or its files are not as long as they should be."""
    meta = _read_meta(entry)
    if meta is None or not all(state["complete"] for state in meta["splits"].values()):
        return None
    dtype = np.dtype(meta["dtype"])
    arrays: dict[str, np.ndarray] = {}
    for split, state in meta["splits"].items():
        path = entry / state["file"]
        if not path.is_file() or path.stat().st_size != state["tokens"] * dtype.itemsize:
            return None
        arrays[split] = np.memmap(path, dtype, "r")
    return arrays


def _read_meta(entry: Path) -> dict[str, Any] | None:
    try:
        return json.loads((entry / cache.META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{entry / cache.META} in the cache cannot be read: {error}. Make it readable, or delete the folder {entry}, which is then "
            "made anew."
        ) from error


def _tokenise(entry: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Makes an entry complete, from nothing or from what a killed process left."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    meta = _read_meta(entry) or {
        "version": VERSION,
        "source": corpus.reader.description,
        "corpus": corpus.fingerprint,
        "tokenizer": {
            "kind": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "dtype": dtype.name,
        "splits": {split: _fresh(split) for split in corpus.splits},
    }
    for split, state in meta["splits"].items():
        _cut(entry / state["file"], split, state, dtype)
        if not state["complete"]:
            _tokenise_split(entry, meta, split, corpus, tokenizer)


def _fresh(split: str) -> dict[str, Any]:
    """How far a split is done: not begun. `next_document` and `position` are those of the source."""
    name = urllib.parse.quote(split, safe="[]:") + ".bin"
    return {"file": name, "documents": 0, "tokens": 0, "next_document": 0, "position": 0, "complete": False}


def _cut(path: Path, split: str, state: dict[str, Any], dtype: np.dtype) -> None:
    """Makes a file as long as `state` says, without what a killed process wrote beyond; or the split begins anew."""
    with cache.writing(path), open(path, "ab") as out:
        if out.tell() < state["tokens"] * dtype.itemsize:  # Somebody has shortened or deleted it.
            state.update(_fresh(split))
        out.truncate(state["tokens"] * dtype.itemsize)


def _tokenise_split(entry: Path, meta: dict[str, Any], split: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
    state, dtype = meta["splits"][split], np.dtype(meta["dtype"])
    extent = corpus.extent(split)
    with contextlib.closing(Progress(f"Tokenising {split} ({corpus.unit})", extent, state["position"])) as progress:
        for block in _blocks(corpus.documents(split, state["next_document"])):
            tokens = np.concatenate(tokenizer.encode_documents([document.text for document in block])).astype(dtype)
            _append(entry / state["file"], tokens)
            state["documents"] += len(block)
            state["tokens"] += len(tokens)
            state["next_document"] = block[-1].number + 1
            state["position"] = block[-1].position
            with cache.writing(entry):
                workdir.write_json(entry / cache.META, meta)
            progress.update(min(state["position"], extent - 1), f"{state['tokens']:,} tokens")
        state["complete"] = True
        with cache.writing(entry):
            workdir.write_json(entry / cache.META, meta)
        progress.update(extent, f"{state['tokens']:,} tokens")


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, of `BLOCK_CHARACTERS` together or a little more."""
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _append(path: Path, tokens: np.ndarray) -> None:
    """Appends to a file; what was appended is on the disk then, also if the machine loses power."""
    with cache.writing(path), open(path, "ab", buffering=0) as out:
        rest = memoryview(tokens.tobytes())
        while rest:  # A write may be cut short without an error.
            rest = rest[out.write(rest) :]
        os.fsync(out.fileno())
