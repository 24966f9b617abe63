"""Texts or pairs of texts with a class or a number each, from columns of a table: TSV, CSV, JSON lines or Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamux_jax.data.examples import (
    TEST,
    TRAIN,
    VALIDATION,
    Examples,
    Files,
    Source,
    hash_fraction,
    in_order,
    number,
    numbered,
)
from datamux_jax.data.tables import Table
from datamux_jax.errors import InputError

KEYS = ("train_file", "validation_file", "test_file", "format", "text", "text_pair", "label", "header", "numbers")


class Labelled(NamedTuple):
    """A row: one or two texts, the label as it is written, and the file and line where it stands."""

    texts: tuple[str, ...]
    label: str
    path: Path
    line: int


def find(data: Any) -> Files:
    """The file of each split.

    Raises:
      InputError: no training file, or a path that is no file.
    """
    named = {TRAIN: data.train_file, VALIDATION: data.validation_file, TEST: data.test_file}
    files = {split: (Path(name).expanduser(),) for split, name in named.items() if name}
    for split, (path,) in files.items():
        if not path.is_file():
            raise InputError(f"data.{split}_file = {named[split]!r} is no file. Check the path.")
    if TRAIN not in files:
        raise InputError("data.source = 'table' needs data.train_file, a TSV, CSV, JSON lines or Parquet file. Name it.")
    return files


def read(data: Any, files: Files) -> Source:
    """The splits. Classes are those of the training file, sorted.

    Without a validation file, the share `data.validation_share` of the training rows is held out as `validation`, chosen by a hash of
    the texts, so that equal rows stay together.

    Raises:
      InputError: a column that is not named or does not exist, a damaged row, a label that is no number, or one that the training
        file does not have, or only one class.
    """
    for key in ("text", "label"):
        if not data[key]:
            raise InputError(f"data.{key} = '' names no column, and data.source = 'table' needs one. Name it.")
    rows = {split: _rows(path, data) for split, (path,) in files.items()}
    names = () if data.numbers else in_order(row.label for row in rows[TRAIN])
    if len(names) == 1:
        raise InputError(
            f"Every row of {files[TRAIN][0]} has the label {names[0]!r} in the column {data.label!r}, which leaves nothing to "
            "learn. Name another column, or add rows."
        )
    for row in (row for each in rows.values() for row in each):
        if names and row.label not in names:
            raise InputError(
                f"{row.path}, line {row.line}: the label {row.label!r} is none of the training file's: "
                f"{', '.join(names[:20])}{' ...' if len(names) > 20 else ''}. Correct the line, or add such rows to the training file."
            )
    if VALIDATION not in rows and data.validation_share:
        held_out = [hash_fraction("\t".join(row.texts)) < data.validation_share for row in rows[TRAIN]]
        both = list(zip(rows[TRAIN], held_out, strict=True))
        rows |= {TRAIN: [row for row, out in both if not out], VALIDATION: [row for row, out in both if out]}
    metrics = ("accuracy",) if names else ("pearson", "spearman")
    return Source({split: _examples(each, names) for split, each in rows.items()}, names, metrics)


def _rows(path: Path, data: Any) -> list[Labelled]:
    texts = (data.text, data.text_pair) if data.text_pair else (data.text,)
    columns = dict.fromkeys(texts, "text") | {data.label: "value"}
    if len(columns) != len(texts) + 1:
        raise InputError(
            f"data.text = {data.text!r}, data.text_pair = {data.text_pair!r} and data.label = {data.label!r} name one column "
            "twice. Name different ones."
        )
    keys = {data[key]: f"data.{key}" for key in ("text", "text_pair", "label")}
    with Table(path, columns, file_format=data.format, header=data.header, named_by=keys) as table:
        return [
            Labelled(tuple(row.values[column] for column in texts), row.values[data.label], path, row.line)
            for row in table.good()
        ]


def _examples(rows: list[Labelled], names: tuple[str, ...]) -> Examples:
    pairs = bool(rows) and len(rows[0].texts) == 2
    inputs: Any = [row.texts for row in rows] if pairs else [row.texts[0] for row in rows]
    if names:
        return Examples(inputs, numbered((row.label for row in rows), names))
    return Examples(inputs, np.array([number(row.label, row.path, row.line) for row in rows], np.float32))
