"""Length buckets of training and evaluation: which length of rows every example needs, and batches cut to it.

A mixed row is as long as its longest instance, so texts of similar length stand together, as they do in prediction (`grouping.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datamux_jax import grouping
from datamux_jax.data.formats import Arrays

# Of what has an entry for every position: the axes of a batch. Labels and a teacher's logits have that many in tagging alone.
AXES = {"inputs": 3, "mask": 3, "label": 3, "teacher": 4}


class Buckets(NamedTuple):
    """Lengths that rows are cut to, and the examples that fit each.

    Attributes:
      lengths: ascending; every one is the smallest that some example fits.
      numbers: of each example, the index of its length, `[n]`.
    """

    lengths: tuple[int, ...]
    numbers: np.ndarray

    def sorted(self, rows: np.ndarray) -> np.ndarray:
        """The given row numbers, those of the shortest length first; inside of a bucket the order stays."""
        return rows[np.argsort(self.numbers[rows], kind="stable")]

    def length(self, rows: np.ndarray) -> int:
        """The length that all of the given examples fit."""
        return self.lengths[self.numbers[rows].max()]


def of(config: Any, arrays: Arrays) -> Buckets | None:
    """The buckets of examples, one row of `arrays` each; None where the config has none."""
    if not ("buckets" in config.data and config.data.buckets):  # Runs of earlier versions have no such key.
        return None
    # An index prefix may take the place of the last tokens.
    prefix = config.num_instances + 1 if (config.demux.name, config.demux.prefix) == ("index", "cut") else 0
    length = arrays["mask"].shape[1]
    sizes = np.minimum(arrays["mask"].sum(-1) + prefix, length)
    needed = np.searchsorted(grouping.bucket_lengths(length), sizes)
    found, numbers = np.unique(needed, return_inverse=True)
    return Buckets(tuple(grouping.bucket_lengths(length)[i] for i in found), numbers)


def cut(batch: Arrays, length: int) -> Arrays:
    """A batch whose arrays by position have `length` of them."""
    return {name: x[:, :, :length] if x.ndim == AXES.get(name) else x for name, x in batch.items()}
