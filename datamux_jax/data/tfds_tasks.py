"""Labelled examples from TensorFlow Datasets, prepared as array_record; TensorFlow itself is not needed to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax.data import tfds_text
from datamux_jax.errors import InputError


def prepared_in(name: str, folder: str) -> bool:
    """Whether a folder is a data_dir that holds the data set; "" is the default one."""
    return not folder or (Path(folder).expanduser() / name).is_dir()


def read(name: str, folder: str, splits: Sequence[str], features: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All records of a data set.

    Args:
      name: of the data set.
      folder: the data_dir; "": the default one.
      splits: that are read.
      features: that are read.

    Returns:
      For each split its records, feature -> value: texts are str, classes of sequences their names, other classes and numbers as they
      are.

    Raises:
      InputError: no such data set, split or feature, or data that are not prepared in this format, or damaged.
    """
    builder = tfds_text.open_builder(name, folder)
    known = builder.info.features
    missing = [feature for feature in features if feature not in known]
    if missing:
        raise InputError(
            f"{builder.info.full_name} has no feature {', '.join(missing)}; it has {', '.join(known)}. Prepare the version that this "
            "version of tensorflow-datasets describes."
        )
    names = {feature: getattr(getattr(known[feature], "feature", None), "names", None) for feature in features}
    return {
        split: [
            {feature: _plain(record[feature], names[feature]) for feature in features} for record in each_record(builder, split)
        ]
        for split in splits
    }


def each_record(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The records of a split as the library gives them, one after the other.

    Raises:
      InputError: no such split, or a damaged file.
    """
    source = tfds_text.open_split(builder, split)
    for start in range(0, len(source), tfds_text.BATCH):
        numbers = list(range(start, min(start + tfds_text.BATCH, len(source))))
        yield from tfds_text.records(source, numbers, builder.data_dir)


def _plain(value: Any, names: Sequence[str] | None) -> Any:
    if names is not None:
        return [names[number] for number in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | np.ndarray):
        return [_plain(item, None) for item in value]
    return value
