"""Running text from TensorFlow Datasets, prepared as array_record; TensorFlow itself is not needed to read it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging

from datamux_jax.data import cache
from datamux_jax.errors import InputError, brief
from datamux_jax.progress import quiet

FILE_FORMAT = "array_record"
BATCH = 256  # Records that are read at once.
MARKERS = re.compile(r"\s*_(?:START_(?:ARTICLE|SECTION|PARAGRAPH)|NEWLINE)_\s*")  # How wiki40b writes its line breaks.


class TfdsText:
    """One text feature of a prepared data set as running text; a document is a record.

    Args:
      data: `config.data`; reads `name`, `path` (the data_dir) and `text_key`.
      splits: names of the splits that are used; slices such as "train[:10%]" too.

    Raises:
      InputError: no such data set, split or feature, or data that are not prepared in this format.
    """

    unit = "documents"

    def __init__(self, data: Any, splits: tuple[str, ...]) -> None:
        if not data.name:
            raise InputError(
                "data.source = 'tfds' needs data.name, the name of a data set, such as 'wikipedia/20230601.en', 'lm1b' or 'c4/en'. "
                "Set it."
            )
        builder = open_builder(data.name, data.path)
        info = builder.info
        _check_feature(data, info)
        total = sum(split.num_examples for split in info.splits.values())
        self._bytes_each = info.dataset_size / max(total, 1)
        self._key = data.text_key
        self._splits = {split: open_split(builder, split) for split in splits}
        examples = {split: len(source) for split, source in self._splits.items()}
        # The name and version say what the content is; the numbers tell data sets apart that were prepared differently.
        self.fingerprint = cache.digest("tfds", info.full_name, self._key, examples, total, int(info.dataset_size))
        self.description = {
            "source": "tfds",
            "name": info.full_name,
            "data_dir": str(builder.data_dir),
            "text_key": self._key,
            "documents": examples,
        }

    def extent(self, split: str) -> int:
        return len(self._splits[split])

    def size(self, split: str) -> int:
        return int(self._bytes_each * len(self._splits[split]))

    def read(self, split: str, start: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, str, int]]:
        source = self._splits[split]
        numbers = filter(wanted, range(start, len(source)))
        while batch := list(itertools.islice(numbers, BATCH)):
            for number, record in zip(batch, records(source, batch, self.description["data_dir"]), strict=True):
                text = record[self._key]
                text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
                text = MARKERS.sub("\n", text).strip()
                if text:
                    yield number, text, number + 1


def records(source: Any, numbers: list[int], place: Any) -> list[Any]:
    """The records with these numbers.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        return source.__getitems__(numbers)
    except RuntimeError as error:  # What array_record raises.
        raise InputError(f"The prepared data in {place} cannot be read: {brief(error)} Prepare or copy them anew.") from error


def open_builder(name: str, path: str) -> Any:
    """The builder of a data set that is prepared as array_record.

    Args:
      name: NAME, NAME/CONFIG or NAME/CONFIG:VERSION.
      path: its data_dir; "": the default one.

    Raises:
      InputError: no such data set, or it is not prepared in this format.
    """
    import tensorflow_datasets as tfds  # Heavy import, needed by this source alone.
    import tensorflow_datasets.text  # Registers wikipedia, wiki40b, c4 and others.

    folder = os.path.expanduser(path) or None
    with quiet(logging.ERROR):  # The library warns on stderr about what is an InputError here.
        try:
            builder = tfds.builder(name, data_dir=folder)
        except (ValueError, AssertionError, OSError) as error:  # AssertionError: no such version.
            problem = "is unknown to" if isinstance(error, tfds.core.DatasetNotFoundError) else "cannot be opened by"
            raise InputError(
                f"data.name = {name!r} {problem} TensorFlow Datasets, with the folder data.path = {path!r}: {brief(error)} "
                "Write NAME, NAME/CONFIG or NAME/CONFIG:VERSION of a data set, or set data.path to the folder in which it is prepared."
            ) from error
        prepared = builder.is_prepared()
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if not prepared or FILE_FORMAT not in formats:
        state = f"in the format {', '.join(sorted(formats))} only" if prepared else "not there"
        where = "" if folder is None else f", data_dir={folder!r}"
        raise InputError(
            f"data.name = {name!r}: the prepared data in {builder.data_dir} are {state}, and {FILE_FORMAT} is needed. Prepare "
            f"them{' in another folder (data.path)' if prepared else ''}, on a machine with a network connection and the packages that "
            f'this data set asks for: python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text; '
            f'tfds.builder({name!r}{where}, file_format={FILE_FORMAT!r}).download_and_prepare()"'
        )
    return builder


def _check_feature(data: Any, info: Any) -> None:
    """Raises InputError if `data.text_key` is no feature with one text."""
    texts = [key for key, feature in info.features.items() if feature.shape == () and np.dtype(feature.np_dtype) == object]
    if data.text_key not in texts:
        problem = "holds no text" if data.text_key in info.features else "does not exist"
        raise InputError(
            f"data.text_key = {data.text_key!r}: this feature of {info.full_name} {problem}. Choose one of: "
            f"{', '.join(sorted(texts)) or 'none, the data set has no text'}."
        )


def open_split(builder: Any, split: str) -> Any:
    """The records of a split; none for an empty slice.

    Raises:
      InputError: there is no such split.
    """
    try:
        if builder.info.splits[split].num_examples:  # An empty slice has no data source.
            return builder.as_data_source(split=split, file_format=FILE_FORMAT)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"The split {split!r} of {builder.info.full_name} does not exist: {brief(error)} Set data.train_split and "
            f"data.validation_split to splits that there are ({', '.join(sorted(builder.info.splits))}), or to slices of them, such as "
            "'train[:10%]'."
        ) from error
    return []
