"""What stands around the tokens of texts in a row: special tokens and padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from datamux_jax.families import SpecialTokens


class Frame(NamedTuple):
    """Ids around and between texts: before the first, between two texts, after the last, for padding, and between words."""

    start: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    space: tuple[int, ...] = ()


def tokens_behind(vocab_size: int, num_instances: int, pad: int, cls: int, sep: int, mask: int) -> tuple[SpecialTokens, int]:
    """Special tokens, with the filler and index tokens behind the vocabulary, and the size with them.

    The size is rounded up to a multiple of 8, so that the table divides over the axes of usual meshes.
    """
    tokens = SpecialTokens(
        pad=pad, cls=cls, sep=sep, mask=mask, mlp_first=cls, filler=vocab_size, index=vocab_size + num_instances, index_cls=cls
    )
    return tokens, -(-(vocab_size + 1 + num_instances) // 8) * 8


def padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, padded, and mask, both `[n, length]` int32."""
    ids = np.full((len(rows), length), pad, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    sizes = np.array([len(tokens) for tokens in rows], np.int32)
    return ids, (np.arange(length) < sizes[:, None]).astype(np.int32)


def framed(
    texts: Iterable[Sequence[int] | np.ndarray], start: tuple[int, ...], end: tuple[int, ...], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `start text end` of the ids of texts, cut to fit: ids and mask `[n, length]` int32, and which were cut, `[n]` bool."""
    room = length - len(start) - len(end)
    rows, cut = [], []
    for ids in texts:
        rows.append([*start, *ids[:room], *end])
        cut.append(len(ids) > room)
    return *padded(rows, length, pad), np.array(cut, bool)
