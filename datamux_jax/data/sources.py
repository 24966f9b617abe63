"""Where examples come from. Table `SOURCES`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from datamux_jax.data import builtin, glue, images, tagging, text_tables
from datamux_jax.data.corpus import CORPORA
from datamux_jax.data.examples import Files, Source
from datamux_jax.errors import InputError, choose


class Reader(NamedTuple):
    """A kind of data set.

    Attributes:
      keys: of `config.data` that it reads, of those in `OPTIONAL`.
      find: the files of each split that `config.data` names; none: the data do not come from files.
      read: all splits of `config.data`, from these files.
    """

    keys: tuple[str, ...]
    find: Callable[[Any], Files]
    read: Callable[[Any, Files], Source]


SOURCES: dict[str, Reader] = {
    "digits": Reader(images.SIZES, lambda _: {}, lambda data, _: builtin.digits(data.validation_examples)),
    "mnist": Reader(images.KEYS, images.find, images.read),
    "cldr": Reader((), lambda _: {}, lambda *_: builtin.cldr()),
    "glue": Reader(("name", "path"), glue.find, glue.read),
    "tagging": Reader(tagging.KEYS, tagging.find, tagging.read),
    "table": Reader(text_tables.KEYS, text_tables.find, text_tables.read),
}
# Keys that some sources read -> the value that means: not set.
OPTIONAL = {
    **dict.fromkeys(("path", "name", "train_file", "validation_file", "test_file", "format", "text", "text_pair", "label"), ""),
    "header": True,
    "numbers": False,
    "validation_examples": 0,
    "image_size": 0,
}
RUNNING = {"files": ("path",), "tfds": ("path", "name")}


def check(data: Any) -> None:
    """Checks that the source of `config.data` exists and reads every key that is set.

    Raises:
      InputError: it does not.
    """
    keys = RUNNING if data.source in CORPORA else {name: reader.keys for name, reader in SOURCES.items()}
    read = keys[choose(keys, data.source, "The data source data.source =")]
    for key, unset in OPTIONAL.items():
        if key not in read and data[key] != unset:
            raise InputError(
                f"data.{key} = {data[key]!r} is set, but data.source = {data.source!r} does not read it; it reads "
                f"{', '.join(f'data.{name}' for name in read) or 'no such key'}. Leave it {unset!r}, or choose another source."
            )


def load(data: Any) -> Source:
    """The data set that `config.data` names; read once, until a file of it changes.

    Args:
      data: `config.data`, with `source` a key of `SOURCES`.

    Raises:
      InputError: no such source, a key that it does not read, data that cannot be read, a damaged row, or a split without examples.
    """
    check(data)
    reader = SOURCES[data.source]
    files = reader.find(data)
    stamps = tuple((split, tuple((file, file.stat().st_mtime_ns) for file in paths)) for split, paths in files.items())
    keys = ("source", "validation_share", *reader.keys)
    return _load(ml_collections.FrozenConfigDict({key: data[key] for key in keys}), stamps)


@functools.lru_cache(maxsize=4)
def _load(data: Any, stamps: tuple[Any, ...]) -> Source:
    files = {split: tuple(file for file, _ in paths) for split, paths in stamps}
    source = SOURCES[data.source].read(data, files)
    for split, examples in source.splits.items():
        if not len(examples):
            places = ", ".join(map(str, files[split])) if split in files else f"data.source = {data.source!r}"
            held_out = split not in files and data.source == "table"
            way_out = (
                f"Too few rows for data.validation_share = {data.validation_share}: raise it, or name a file"
                if held_out
                else "Check what is there, or name other data"
            )
            raise InputError(f"The split {split!r} has no examples in {places}. {way_out}.")
    return source
