"""Files of predictions, written window by window, that survive a kill at any moment: TSV, CSV, JSON lines and Parquet.

    OUT.partial     what is written so far (for Parquet as JSON lines, which can be appended to)
    OUT.state.json  how much of it is good, what for, and whether it is finished; `counts`: what became of the rows, see `Tally`;
                    `input`: size and time of the input, and `digest`: of its rows, so that another input is not taken for it
    OUT             the complete file

A window is appended and forced to the disk, then the state is replaced. What stands in the file behind the state is part of a
window that was not finished; it is cut off before prediction goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from datamux_jax import workdir
from datamux_jax.errors import InputError
from datamux_jax.tally import Tally

Columns = Mapping[str, str]  # Name -> what it holds: "integer", "number", "string", "truth", or "words", a list of strings.
FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
PARTIAL = ".partial"
STATE = ".state.json"
NO_TAG = "_"  # In TSV and CSV, of a word that was cut off.
PARQUET_ROWS = 16384  # Of a row group.


class Output(Protocol):
    """Takes rows; `tally` and `digest` are those of the windows it holds already."""

    tally: Tally
    digest: str

    def write(self, rows: Sequence[Mapping[str, Any]], tally: Tally, digest: str) -> None: ...
    def finish(self) -> None: ...


def encoded(rows: Sequence[Mapping[str, Any]], columns: Columns, kind: str, *, header: bool) -> bytes:
    """Rows as TSV, CSV or JSON lines.

    Args:
      rows: column -> value; None where there is none.
      columns: of the file.
      kind: "tsv", "csv" or "jsonl".
      header: TSV and CSV: begin with the names of the columns.
    """
    if kind == "jsonl":
        return "".join(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows).encode(
            "utf-8", "replace"
        )
    lines = [list(columns)] if header else []
    lines += [[_field(row[name]) for name in columns] for row in rows]
    if kind == "tsv":
        text = "".join("\t".join(" ".join(field.split()) for field in line) + "\n" for line in lines)
    else:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(lines)
        text = buffer.getvalue()
    return text.encode("utf-8", "replace")


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(NO_TAG if item is None else item for item in value)
    return f"{value:.6f}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


class Stream:
    """An open binary stream as `Output`, such as standard output: nothing of it can be continued."""

    def __init__(self, handle: BinaryIO, columns: Columns, kind: str) -> None:
        self.tally, self.digest = Tally(), ""
        self._handle, self._columns, self._kind = handle, columns, kind

    def write(self, rows: Sequence[Mapping[str, Any]], tally: Tally, digest: str) -> None:
        self._handle.write(encoded(rows, self._columns, self._kind, header=self.tally.rows == 0))
        self._handle.flush()
        self.tally = tally

    def finish(self) -> None:
        """Of no rows, the header."""
        if self.tally.rows == 0:
            self.write([], self.tally, "")


class OutputFile:
    """A file as `Output`, which goes on where it was interrupted.

    Args:
      path: of the file; its ending is a key of `FORMATS`.
      columns: of the file.
      settings: everything that decides its content; must be the same when it is continued.
      source: what tells the input from what it was, as `stamp` says; None: nothing does, short of reading it.

    Attributes:
      finished: the file is complete: nothing is to be done, if the input is still what it was; see `stream.check_finished`.

    Raises:
      InputError: an unknown ending, a file that cannot be written, that is none of ours, that has other settings, or that another
        process is writing.
    """

    def __init__(
        self, path: Path, columns: Columns, settings: Mapping[str, Any], source: Mapping[str, int] | None = None
    ) -> None:
        self.path, self._columns, self._source = path, columns, source
        self._kind = check_output(path)
        self._partial = path.with_name(path.name + PARTIAL)
        self.state_file = path.with_name(path.name + STATE)
        self._settings = json.loads(json.dumps(settings))
        self.tally, self.digest, self.finished = Tally(), "", False
        self._written = 0
        if self.state_file.exists():
            state = workdir.read_json(self.state_file)
            _check_settings(path, state["settings"], self._settings, state["settings"].keys() | self._settings.keys())
            self.tally, self.digest, self._written = Tally(**state["counts"]), state["digest"], state["bytes"]
            # Killed after the complete file got its name, before the state said so.
            self.finished = path.exists() and (state["finished"] or not self._partial.exists())
        if not self.finished:
            self._handle = self._open(self._written)

    def confirm(self) -> None:
        """Says in the state of a finished file that it was made of the input as it is now."""
        self._save(self._written, finished=True)
        self._partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the file; what was written stays, and can be gone on with."""
        if not self.finished:
            self._handle.close()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, size: int) -> BinaryIO:
        handle = self._partial.open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise InputError(
                f"Another process is writing --output={self.path}. Wait for it, stop it, or choose another."
            ) from error
        there = os.fstat(handle.fileno()).st_size
        if there < size:
            handle.close()
            raise InputError(
                f"{self._partial} has {there:,} bytes, but {size:,} were written. Restore it, or remove it with "
                f"{self.state_file.name} to start anew."
            )
        handle.truncate(size)
        self._save(size, finished=False)
        return handle

    def write(self, rows: Sequence[Mapping[str, Any]], tally: Tally, digest: str) -> None:
        """Appends a window for good."""
        kind = "jsonl" if self._kind == "parquet" else self._kind
        self._handle.write(encoded(rows, self._columns, kind, header=self.tally.rows == 0))
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.tally, self.digest = tally, digest
        self._save(self._size(), finished=False)

    def finish(self) -> None:
        """Gives the complete file its name."""
        kind = "jsonl" if self._kind == "parquet" else self._kind
        if self.tally.rows == 0:
            self._handle.write(encoded([], self._columns, kind, header=True))
            self._handle.flush()
        size = self._size()
        if self._kind == "parquet":
            with workdir.replacing(self.path) as temporary:
                to_parquet(self._partial, temporary, self._columns)
        else:
            os.replace(self._partial, self.path)
        self._save(size, finished=True)
        self.close()
        self._partial.unlink(missing_ok=True)
        self.finished = True

    def _size(self) -> int:
        return os.fstat(self._handle.fileno()).st_size

    def _save(self, size: int, *, finished: bool) -> None:
        state = {
            "settings": self._settings,
            "counts": dataclasses.asdict(self.tally),
            "bytes": size,
            "digest": self.digest,
            "input": self._source,
            "finished": finished,
        }
        workdir.write_json(self.state_file, state)


def _check_settings(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str]) -> None:
    different = [f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in sorted(keys) if old.get(key) != new.get(key)]
    if different:
        raise InputError(
            f"--output={path} was begun with other settings ({'; '.join(different)}). Give the same to go on with it, or another "
            f"--output; or remove it with {path.name + STATE} to start anew. Nothing was changed."
        )


def stamp(path: Path) -> dict[str, int]:
    """What tells a file from what it was, without reading it."""
    there = path.stat()
    return {"bytes": there.st_size, "modified_ns": there.st_mtime_ns}


def complete(path: Path, settings: Mapping[str, Any], model: str, source: Mapping[str, int] | None) -> Tally | None:
    """What a complete file holds; known before the model is loaded.

    Args:
      path: of the file.
      settings: as for `OutputFile`, those that are known without the model.
      model: the setting of this name, as it probably is.
      source: as for `OutputFile`.

    Returns:
      None if there is something to do, or to say, or if the input has to be read to know that it is the same; all of this needs the
      model.

    Raises:
      InputError: the file was begun with other `settings`.
    """
    state_file = path.with_name(path.name + STATE)
    if not state_file.exists():
        return None
    state = workdir.read_json(state_file)
    _check_settings(path, state["settings"], settings, settings)
    whole = state["finished"] and path.exists() and not path.with_name(path.name + PARTIAL).exists()
    same = source is not None and state.get("input") == source  # Earlier versions did not say.
    return Tally(**state["counts"]) if whole and same and state["settings"]["model"] == model else None


def check_output(path: Path) -> str:
    """The format of the file to write, a value of `FORMATS`.

    Raises:
      InputError: an unknown ending, a folder that cannot be written, Parquet without pyarrow, or a file that is none of ours.
    """
    if path.suffix not in FORMATS:
        raise InputError(
            f"--output={path} has the ending {path.suffix!r}, which is no format. Choose one of: {', '.join(FORMATS)}."
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(
            f"--output={path} cannot be written: its folder does not exist, or may not be written. Choose another."
        )
    if path.exists() and not path.with_name(path.name + STATE).exists():
        raise InputError(f"--output={path} exists and is not overwritten. Remove it, or choose another name.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--output={path} is Parquet, which needs pyarrow. Run pip install 'datamux_jax[parquet]', or write .tsv, .csv "
                "or .jsonl."
            ) from error
    return FORMATS[path.suffix]


def to_parquet(lines: Path, target: Path, columns: Columns) -> None:
    """Writes a file of JSON lines as Parquet, in row groups of a fixed size."""
    import pyarrow
    import pyarrow.parquet

    types = {
        "integer": pyarrow.int64(),
        "number": pyarrow.float64(),
        "string": pyarrow.string(),
        "truth": pyarrow.bool_(),
        "words": pyarrow.list_(pyarrow.string()),
    }
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    with lines.open(encoding="utf-8", newline="\n") as source, pyarrow.parquet.ParquetWriter(target, schema) as writer:
        while part := list(itertools.islice(source, PARQUET_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in part], schema=schema))
