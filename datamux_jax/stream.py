"""Prediction for tables of any size in bounded memory: rows in, one row out for each, in the same order.

Rows are taken in windows; a window is read and encoded in a thread of its own while the device works on the one before. Windows depend
on the rows alone, so an interrupted prediction goes on at the start of one and computes the same numbers.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from datamux_jax.background import background
from datamux_jax.data import conll
from datamux_jax.data.formats import Format
from datamux_jax.data.tables import Row
from datamux_jax.errors import InputError
from datamux_jax.inference import Inference, Prediction, Window
from datamux_jax.output_files import Output, OutputFile
from datamux_jax.progress import Progress
from datamux_jax.tally import Tally

WINDOW_CHARACTERS = 1 << 25  # A window ends early when its texts are longer than this together.
WORD = 32  # Characters that a word counts as besides its own: it is an object, and has a row of logits.
FEATURES = "features"
COLUMNS = {
    "classification": {"label": "string", "probability": "number"},
    "regression": {"value": "number"},
    "tagging": {"tags": "words"},
}


class Rows(Protocol):
    """Where rows come from: `data.tables.Table`, or `Features`."""

    name: str
    size: int

    @property
    def position(self) -> int: ...
    def rows(self) -> Iterator[Row]: ...


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which columns of the input are what.

    Attributes:
      inputs: the text, the two texts of a pair, the words, or `FEATURES`.
      id: that names the row, copied to the output; "": none.
      label: what the prediction should be, only checked: a label that the model does not know, neither by its name nor as the files of
        its data write it, is reported. "": none.
      echo: copy the text to the output, too.
    """

    inputs: tuple[str, ...]
    id: str = ""
    label: str = ""
    echo: bool = False

    def kinds(self, inference: Inference) -> dict[str, str]:
        """What each column holds, as `Table` wants to know it.

        Raises:
          InputError: more or fewer columns of text than the model reads, or one column named twice.
        """
        reads = inference.format.inputs
        wanted = 2 if reads == "pair" else 1
        if len(self.inputs) != wanted:
            raise InputError(
                f"{len(self.inputs)} columns of text were named, but the model reads {reads!r}. Name {wanted}: --text=COLUMN"
                + (" and --text_pair=COLUMN." if wanted == 2 else " alone.")
            )
        named = [name for name in (*self.inputs, self.id, self.label) if name]
        if len(set(named)) < len(named):
            raise InputError(f"One column is named twice among {', '.join(named)}. Each holds one thing; name another one.")
        kinds = dict.fromkeys(self.inputs, "words" if reads == "words" else "text")
        kinds |= {self.id: "id"} if self.id else {}
        return kinds | ({self.label: "words" if inference.objective == "tagging" else "value"} if self.label else {})

    def columns(self, objective: str) -> dict[str, str]:
        """Columns of the output, with what they hold, as `output_files.Columns` says."""
        columns = {"row": "integer"} | ({"id": "string"} if self.id else {}) | COLUMNS[objective]
        columns |= {"truncated": "truth", "error": "string"}
        return columns | (dict.fromkeys((f"input_{name}" for name in self.inputs), "string") if self.echo else {})


class Block(NamedTuple):
    """A window of rows.

    Attributes:
      rows: all of them.
      errors: what is reported of each; "": nothing.
      scored: which rows are predicted, as positions in `rows`.
      window: their inputs.
      position: bytes of the input that were read for this window and those before.
      digest: of all rows up to here.
    """

    rows: list[Row]
    errors: list[str]
    scored: list[int]
    window: Window
    position: int
    digest: str


class Features:
    """The rows of a `.npy` array `[n, L, F]`, read as they are needed.

    Raises:
      InputError: the file cannot be read, or holds no such array.
    """

    def __init__(self, name: str, fmt: Format) -> None:
        self.name, self.format, shape = name, fmt, fmt.input_shape
        self.size = self.position = 0
        try:
            array = np.load(name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"--input={name} cannot be read: {error}. Check the path and its permissions.") from error
        if not isinstance(array, np.ndarray) or array.shape[1:] != shape or array.dtype.kind not in "fiub":
            held = f"shape {list(array.shape)}, {array.dtype}" if isinstance(array, np.ndarray) else "several arrays"
            raise InputError(f"--input={name} holds {held}, but this model reads numbers of shape [n, {shape[0]}, {shape[1]}].")
        self._array = array
        self.size = array.nbytes

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *exception: object) -> None:
        """The mapping ends with the last row that is in use."""

    def rows(self) -> Iterator[Row]:
        for number, features in enumerate(self._array, start=1):
            self.position += features.nbytes
            value = np.asarray(features, np.float32)
            yield Row(number, number, {FEATURES: value}, self.format.problem(value))


def blocks(source: Rows, inference: Inference, fields: Fields, *, skip: int, digest: str) -> Iterator[Block]:
    """The windows of all rows after the first `skip`.

    Args:
      source: of the rows.
      inference: encodes them.
      fields: which columns are what.
      skip: rows that were predicted before.
      digest: of these, as the last block had it.

    Raises:
      InputError: the rows to skip are not those of `digest`.
    """
    hashed = hashlib.blake2b(digest_size=16)
    rows: list[Row] = []
    number = characters = 0
    for row in source.rows():
        number = row.number
        _add(hashed, row)
        if number <= skip:
            if number == skip and hashed.hexdigest() != digest:
                raise _changed(source, skip)
            continue
        rows.append(row)
        characters += sum(map(_characters, row.values.values()))
        if len(rows) == inference.window or characters >= WINDOW_CHARACTERS:
            yield _block(rows, inference, fields, source.position, hashed.hexdigest())
            rows, characters = [], 0
    if number < skip:
        raise _changed(source, skip)
    if rows:
        yield _block(rows, inference, fields, source.position, hashed.hexdigest())


def _add(hashed: hashlib.blake2b, row: Row) -> None:
    for value in (row.problem, *row.values.values()):
        hashed.update(value.tobytes() if isinstance(value, np.ndarray) else f"{value!r}\n".encode("utf-8", "replace"))


def check_finished(source: Rows, output: OutputFile) -> None:
    """Checks that a finished output is that of the rows of `source`, by reading them all; nothing is predicted.

    Rows that were appended are not predicted either: who shares a row with whom would depend on where the input ended before.

    Raises:
      InputError: rows were changed, added or taken away.
    """
    rows = output.tally.rows
    hashed, number = hashlib.blake2b(digest_size=16), 0
    for row in source.rows():
        number = row.number
        if number > rows:
            break
        _add(hashed, row)
    changed = number < rows or (rows > 0 and hashed.hexdigest() != output.digest)
    if changed or number > rows:
        problem = f"its first {rows:,} rows are no longer those" if changed else f"it has more than those {rows:,} rows now"
        raise InputError(
            f"--output={output.path} is complete, with {rows:,} rows, but {source.name} is another input: {problem}. Give another "
            f"--output; or remove it with {output.state_file.name} to predict all rows anew. Nothing was changed."
        )
    output.confirm()


def _characters(value: Any) -> int:
    return sum(len(word) + WORD for word in value) if isinstance(value, list) else len(value)


def _changed(source: Rows, skip: int) -> InputError:
    return InputError(
        f"The first {skip:,} rows of {source.name} are no longer those that were predicted before the interruption. Give the input as "
        "it was, or another --output to start anew."
    )


def _block(rows: list[Row], inference: Inference, fields: Fields, position: int, digest: str) -> Block:
    errors, scored, inputs = [], [], []
    known = _known_labels(inference)
    for place, row in enumerate(rows):
        error = row.problem
        readable = all(name in row.values for name in fields.inputs)
        # A row whose id or label alone is wrong is predicted, and reported.
        beside = any(name not in row.values for name in (fields.id, fields.label) if name)
        if readable and not row.broken and (not error or beside):
            scored.append(place)
            values = [row.values[name] for name in fields.inputs]
            inputs.append(tuple(values) if len(values) == 2 else values[0])
            error = error or _label_error(row, inference, fields, known)
        errors.append(error)
    empty = Window({}, np.zeros(0, int), np.zeros(0, bool), None)
    return Block(rows, errors, scored, inference.encode(inputs) if inputs else empty, position, digest)


def _known_labels(inference: Inference) -> set[str]:
    """The labels that files of the data may have: as the model names them, or as they are written."""
    known = {*inference.labels, *inference.format.written}
    # The model's tags are IOB2; files of other schemes have other letters before the type.
    if "entity_f1" in inference.format.metrics:
        known |= {letter + name[1:] for name in inference.labels if name != conll.OUTSIDE for letter in conll.LETTERS}
    return known


def _label_error(row: Row, inference: Inference, fields: Fields, known: set[str]) -> str:
    """What is wrong with the label of a row; "": nothing."""
    if not fields.label:
        return ""
    label = row.values[fields.label]
    if inference.objective == "regression":
        try:
            float(label)
        except ValueError:
            return f"has the label {label!r}, which is no number"
        return ""
    unknown = next((name for name in (label if isinstance(label, list) else [label]) if name not in known), None)
    if unknown is not None:
        return f"has the label {unknown!r}, which the model does not know"
    words = row.values[fields.inputs[0]]
    if isinstance(label, list) and len(label) != len(words):
        return f"has {len(label)} labels for {len(words)} words"
    return ""


def predict_rows(
    inference: Inference,
    source: Rows,
    output: Output,
    fields: Fields,
    *,
    ensemble: int = 1,
    buckets: bool = True,
    show: bool = True,
) -> Tally:
    """Predicts all rows that `output` does not hold yet.

    Args:
      inference: the model.
      source: the rows.
      output: takes a row for each, in order.
      fields: which columns are what.
      ensemble: as for `Inference.logits`.
      buckets: as for `Inference.logits`.
      show: progress on standard output: of a file, kB and time left; of a stream, rows and their rate.

    Returns:
      What became of all rows of the output, those before an interruption too.

    Raises:
      InputError: the input is another one than before an interruption, or cannot be read to its end.
    """
    waiting: collections.deque[Block] = collections.deque()
    total = max(source.size // 1024, 1) if source.size else None
    label, start = ("Predicting (kB read)", 0) if total else ("Predicting (rows)", output.tally.rows)
    progress = Progress(label, total, start) if show else None
    tally, first = output.tally, True

    def windows() -> Iterator[Window]:
        made = blocks(source, inference, fields, skip=output.tally.rows, digest=output.digest)
        for block in background(made):
            waiting.append(block)
            yield block.window

    for logits in inference.outputs(windows(), ensemble=ensemble, buckets=buckets):
        block = waiting.popleft()
        answers = inference.answers(logits) if block.scored else []
        cut, problems = int(block.window.truncated.sum()), filter(None, block.errors)
        tally = tally.plus(rows=len(block.rows), scored=len(block.scored), truncated=cut, problems=problems)
        output.write(list(_lines(block, answers, fields, inference.objective)), tally, block.digest)
        if progress:
            done = min(block.position // 1024, total - 1) if total else tally.rows
            progress.update(done, f"{tally.rows:,} rows" if total else "")
            if first:  # What came before is compilation, and rows passed over.
                progress.restart_clock(done)
        first = False
    output.finish()
    if progress:
        progress.close()
    return tally


def _lines(block: Block, answers: list[Any], fields: Fields, objective: str) -> Iterator[dict[str, Any]]:
    """Rows of the output."""
    columns = fields.columns(objective)
    places = {place: number for number, place in enumerate(block.scored)}
    for place, (row, error) in enumerate(zip(block.rows, block.errors, strict=True)):
        values: dict[str, Any] = dict.fromkeys(columns)
        values |= {"row": row.number, "error": error or None}
        if fields.id:
            values["id"] = row.values.get(fields.id)
        if fields.echo:
            given = {name: row.values.get(name) for name in fields.inputs}
            values |= {f"input_{name}": " ".join(v) if isinstance(v, list) else v for name, v in given.items()}
        if place in places:
            values["truncated"] = bool(block.window.truncated[places[place]])
            answer = answers[places[place]]
            if isinstance(answer, Prediction):
                values |= {"label": answer.label, "probability": round(answer.probability, 6)}
            elif isinstance(answer, list):
                values["tags"] = answer
            else:
                values["value"] = round(answer, 6)
        yield values
