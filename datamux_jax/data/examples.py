"""What a data set of examples is: inputs and labels in splits, and what is reported of predictions."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from datamux_jax.errors import InputError, choose

TRAIN, VALIDATION, TEST = "train", "validation", "test"
Files = Mapping[str, Sequence[Path]]  # Split -> the files that it is read from, one after the other.


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split.

    Attributes:
      inputs: texts; pairs of texts; lists of words; or features `[n, L, F]`.
      labels: classes `[n]`, int32; numbers `[n]`, float32; or, of words, one int32 array an example.
    """

    inputs: list[str] | list[tuple[str, str]] | list[list[str]] | np.ndarray
    labels: np.ndarray | list[np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)  # Known by identity, so that what is made of it can be remembered.
class Source:
    """A data set: its splits, what the labels mean (no names: numbers), what is reported, and the labels as files write them (none: the
    names)."""

    splits: Mapping[str, Examples]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    written: tuple[str, ...] = ()

    def split(self, name: str) -> Examples:
        """Raises InputError, with the choices, if there is no such split."""
        return self.splits[choose(self.splits, name, "The data split")]


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone: splits stay the same on every machine and for every version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def numbered(labels: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """Labels as positions in `names`, `[n]` int32."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], np.int32)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels, sorted; as numbers, if all of them are whole numbers."""
    different = set(labels)
    if all(label.isdecimal() for label in different):
        return tuple(sorted(different, key=lambda label: (int(label), label)))
    return tuple(sorted(different))


def number(label: str, path: Path, line: int) -> float:
    """A label that is a number.

    Raises:
      InputError: it is none, with file and line.
    """
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}, line {line}: the label {label!r} is no number. Correct the line, or train for classes.")
    return value
