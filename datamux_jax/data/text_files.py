"""Running text in files: plain text, UTF-8 (with or without byte-order mark), or UTF-16 and UTF-32 with byte-order mark."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datamux_jax import workdir
from datamux_jax.data import cache
from datamux_jax.errors import InputError, choose
from datamux_jax.progress import Progress

SUFFIX = ".txt"
SPLIT = "train"
# That of UTF-32 starts with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT = 1 << 24  # Characters; a tokenizer needs some hundred bytes of memory for each.
# A file that was changed so shortly before may change once more without a new modification time.
SETTLED_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of running text: its name below the root, where it is, its size in bytes and modification time in nanoseconds."""

    name: str
    path: Path
    size: int
    modified: int


class TextFiles:
    """Text files as running text, in the order of their names; all of it is one split, `train`.

    Args:
      data: `config.data`; reads `path`, `document` and `cache`.
      splits: names of the splits that are asked for.

    Raises:
      InputError: no files, unreadable ones, bytes that are not text, an unknown split or kind of document.
    """

    unit = "kB"

    def __init__(self, data: Any, splits: tuple[str, ...]) -> None:
        for split in splits:
            if split != SPLIT:
                raise InputError(
                    f"The split {split!r} does not exist: text files are one split, {SPLIT!r}. Set data.train_split={SPLIT!r}, leave "
                    "data.validation_split empty, and hold out a data.validation_share of the documents."
                )
        self._cut, self._clean = DOCUMENTS[choose(DOCUMENTS, data.document, "The kind of document data.document =")]
        self._files = find(data.path)
        whole = str(Path(data.path).expanduser().absolute())
        digests = _digests(self._files, cache.folder(data) / "files" / cache.digest(whole))
        self._bytes = sum(file.size for file in self._files)
        self.fingerprint = cache.digest("files", data.document, [[file.name, digests[file.name]] for file in self._files])
        self.description = {
            "source": "files",
            "path": data.path,
            "files": len(self._files),
            "bytes": self._bytes,
            "document": data.document,
        }

    def extent(self, split: str) -> int:
        return self._bytes // 1000

    def size(self, split: str) -> int:
        return self._bytes

    def read(self, split: str, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str, int]]:
        number = before = 0
        for file in self._files:
            with _opened(file) as handle:
                encoding, mark = _encoding(handle)
                handle.seek(mark)
                with io.TextIOWrapper(handle, encoding) as text:
                    for document in self._cut(file.path, text):
                        if number >= start and wanted(number):
                            yield number, self._clean(document), (before + handle.tell()) // 1000
                        number += 1
            before += file.size


def find(path: str) -> list[TextFile]:
    """The text files that `data.path` names: a file, all `*.txt` below a folder, or those that match a pattern.

    Hidden files and folders are left out, but for a file that is named itself.

    Returns:
      The files in the order of their names, which are relative to the folder, or to the part of the pattern before its first wildcard.

    Raises:
      InputError: there are none.
    """
    whole = Path(path).expanduser()
    if path and whole.is_file():
        root, paths = whole.parent, [whole]
    elif path and whole.is_dir():
        root, paths = whole, list(_below(whole))
    else:
        parts = whole.parts
        fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root = Path(*parts[:fixed])
        paths = [found for found in map(Path, glob.glob(str(whole), recursive=True)) if found.is_file()]
    if not paths:
        problem = f"has no {SUFFIX} file in it" if path and whole.is_dir() else "names no file"
        raise InputError(
            f"data.path = {path!r} {problem}. Set it to a text file, to a folder with {SUFFIX} files, or to a pattern such as "
            "'books/*.txt'."
        )
    return sorted((_stat(root, found) for found in paths), key=lambda file: file.name)


def _below(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIX))


def _raise(error: OSError) -> None:
    raise InputError(_unreadable(error.filename, error)) from error


def _stat(root: Path, path: Path) -> TextFile:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(_unreadable(path, error)) from error
    return TextFile(path.relative_to(root).as_posix(), path, status.st_size, status.st_mtime_ns)


def _unreadable(path: Any, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror}. Make it readable, or leave it out of data.path."


def _opened(file: TextFile) -> BinaryIO:
    """Raises InputError if the file cannot be opened, or is no longer what it was when the corpus was opened."""
    try:
        handle = file.path.open("rb")
    except OSError as error:
        raise InputError(_unreadable(file.path, error)) from error
    status = os.fstat(handle.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        handle.close()
        raise InputError(
            f"{file.path} changed while it was being read. Wait until it is complete, and run the same command again: it reads the "
            "new content."
        )
    return handle


def _encoding(handle: BinaryIO) -> tuple[str, int]:
    """The encoding of a file that is at its start, and the length of its byte-order mark."""
    start = handle.read(4)
    return next(((name, len(mark)) for mark, name in MARKS if start.startswith(mark)), ("utf-8", 0))


def _paragraphs(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    while line := text.readline(MAX_DOCUMENT + 1):
        if line.isspace():
            if lines:
                yield "".join(lines)
            lines, size = [], 0
        else:
            lines.append(line)
            size += len(line)
            _check_size(path, size, "paragraph", "'line'")
    if lines:
        yield "".join(lines)


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_DOCUMENT + 1):
        _check_size(path, len(line), "line", "'paragraph'")
        if not line.isspace():
            yield line


def _whole(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    content = text.read(MAX_DOCUMENT + 1)
    _check_size(path, len(content), "file", "'paragraph' or 'line'")
    if content and not content.isspace():
        yield content


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


# Kind of document -> how a file is cut into documents, and how the text of one that is wanted is cleaned.
Cut = Callable[[Path, io.TextIOWrapper], Iterator[str]]
DOCUMENTS: dict[str, tuple[Cut, Callable[[str], str]]] = {
    "paragraph": (_paragraphs, _joined),
    "line": (_lines, str.strip),
    "file": (_whole, str.strip),
}


def _check_size(path: Path, size: int, kind: str, others: str) -> None:
    if size > MAX_DOCUMENT:
        raise InputError(
            f"{path} has a document of more than {MAX_DOCUMENT:,} characters (data.document = {kind!r}), too long to be tokenised at "
            f"once. Set data.document to {others}, or break the text up."
        )


def _digests(files: list[TextFile], entry: Path) -> dict[str, str]:
    """Hash of each file's bytes, by name; files whose size and modification time the cache remembers are not read.

    Raises:
      InputError: a file cannot be read or is no text, or the cache cannot be written.
    """
    known = _known(files, entry)
    if len(known) == len(files):
        return known
    with cache.claimed(entry, "reading this text"):
        known = _known(files, entry)
        unread = [file for file in files if file.name not in known]
        done = 0
        # One more than there is: reaching the total would print a line even if all this took no time.
        with contextlib.closing(Progress("Checking the text (kB)", 1 + sum(file.size for file in unread) // 1000)) as progress:
            for file in unread:
                known[file.name] = _digest(file)
                done += file.size
                progress.update(done // 1000)
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        memory = {f.name: [f.size, f.modified, known[f.name]] for f in files if f.modified < settled}
        with cache.writing(entry):
            workdir.write_json(entry / "memory.json", memory)
    return known


def _known(files: list[TextFile], entry: Path) -> dict[str, str]:
    try:
        memory = json.loads((entry / "memory.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {f.name: memory[f.name][2] for f in files if f.name in memory and memory[f.name][:2] == [f.size, f.modified]}


def _digest(file: TextFile) -> str:
    """Hash of a file's bytes, all of which are decoded on the way, so that bad ones are found before any work is done."""
    with _opened(file) as handle:
        encoding, mark = _encoding(handle)
        handle.seek(0)
        hashed = hashlib.blake2b(handle.read(mark), digest_size=16)
        decoder = codecs.getincrementaldecoder(encoding)()
        offset, block = mark, b"-"
        while block:
            block = handle.read(BLOCK_BYTES)
            hashed.update(block)
            if encoding == "utf-8" and offset == 0 and b"\0" in block:
                raise InputError(
                    f"{file.path} has a zero byte at offset {block.index(0)}, so it is no UTF-8 text; it may be UTF-16 without a "
                    "byte-order mark. Convert it (iconv -f UTF-16LE -t UTF-8), or leave it out of data.path."
                )
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise InputError(
                    f"{file.path} is no {encoding.upper()} text: the byte at offset {at} (0x{error.object[error.start]:02x}) does not "
                    "belong there. Correct it, convert the file (such as iconv -f WINDOWS-1252 -t UTF-8), or leave it out of data.path."
                ) from error
            offset += len(block)
    return hashed.hexdigest()
