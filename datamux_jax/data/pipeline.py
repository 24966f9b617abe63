"""From examples to batches: `[B, N, ...]` groups, freshly drawn every epoch, in an order that depends on the seed alone.

Batch `k` is a pure function of `(seed, k)`, so a grain iterator's state is one number, and a resumed run sees exactly the
examples that an uninterrupted one would have seen. Each host takes its own rows of the global batch.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from datamux_jax.data import sources
from datamux_jax.data.tokenizers import TOKENIZERS
from datamux_jax.errors import InputError, choose
from datamux_jax.families import SpecialTokens

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Format:
    """How raw inputs become arrays; saved with a run, so that prediction needs nothing else.

    Attributes:
      label_names: class names, in label order.
      length: `L`.
      tokenizer: key of `TOKENIZERS`; empty for feature inputs.
      feature_size: `F` of feature inputs; 0 for text.
      vocab_size: `V` of the network, prefix tokens included; 0 for feature inputs.
      tokens: ids of the special tokens; None for feature inputs.
      token_labels: labels belong to tokens, not to examples.
    """

    label_names: tuple[str, ...]
    length: int
    tokenizer: str = ""
    feature_size: int = 0
    vocab_size: int = 0
    tokens: SpecialTokens | None = None
    token_labels: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Format:
        """The format whose `dataclasses.asdict` was saved."""
        tokens = fields["tokens"] and SpecialTokens(**fields["tokens"])
        return cls(**{**fields, "label_names": tuple(fields["label_names"]), "tokens": tokens})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one instance: `[L]` or `[L, F]`."""
        return (self.length,) if self.vocab_size else (self.length, self.feature_size)

    @property
    def input_dtype(self) -> np.dtype:
        return np.dtype(np.int32 if self.vocab_size else np.float32)

    def encode(self, inputs: Any) -> Arrays:
        """`inputs` and `mask` arrays of texts, or of features `[n, L, F]`.

        Raises:
          InputError: the inputs are not what this format reads.
        """
        if self.vocab_size and not self.tokenizer:
            raise InputError(
                "This run was converted from a published checkpoint and has no tokenizer for texts yet. Train a run that starts "
                "from it (init_from), and load that."
            )
        if self.tokenizer:
            if isinstance(inputs, str) or not isinstance(inputs, Sequence):
                raise InputError(f"This model reads a list of strings, but got {_short(inputs)}. Pass a list: [text, ...].")
            for text in inputs:
                if not isinstance(text, str):
                    raise InputError(f"This model reads a list of strings, but an entry is {_short(text)}. Pass strings only.")
            ids, mask = TOKENIZERS[self.tokenizer]().encode(list(inputs), self.length)
            return {"inputs": ids, "mask": mask}
        try:
            features = np.asarray(inputs, np.float32)
        except (TypeError, ValueError):
            features = np.empty(0, np.float32)
        if features.ndim != 3 or features.shape[1:] != self.input_shape:
            raise InputError(
                f"This model reads feature arrays of shape [n, {self.length}, {self.feature_size}], but got "
                f"{'shape ' + str(list(features.shape)) if features.ndim > 1 else 'something else'}. Reshape the inputs, or load "
                "a model that was trained on text."
            )
        if not np.isfinite(features).all():
            raise InputError(
                "The features hold a NaN or an infinity, and one such value spoils its whole group. Remove or replace it first."
            )
        return {"inputs": features, "mask": np.ones(features.shape[:2], np.int32)}


def load(config: Any) -> tuple[Format, dict[str, Arrays]]:
    """Reads, tokenises and formats all splits of the data set that `config.data` names.

    Returns:
      The format, and for each split the arrays `inputs`, `mask` and `label`, one row an example.

    Raises:
      InputError: unknown names, or a length that does not fit the source.
    """
    source = sources.load(config.data.source)
    first = next(iter(source.splits.values())).inputs
    if isinstance(first, np.ndarray):
        fmt = Format(source.label_names, first.shape[1], feature_size=first.shape[2])
        if config.data.length not in (0, fmt.length):
            raise InputError(
                f"data.length = {config.data.length}, but the source {config.data.source!r} has inputs of length {fmt.length}. "
                "Set data.length to 0 to take the source's own."
            )
    else:
        if config.data.length < 2:
            raise InputError(
                f"data.length = {config.data.length}, but a text needs at least 2 positions, [CLS] and one token. Raise it."
            )
        tokenizer = choose(TOKENIZERS, config.data.tokenizer, "The tokenizer data.tokenizer =")
        # Only the index demultiplexer feeds tokens that no text has.
        encoder = TOKENIZERS[tokenizer]()
        tokens, size = encoder.special_tokens(config.num_instances)
        size = size if config.demux.name == "index" else encoder.vocab_size
        fmt = Format(source.label_names, config.data.length, tokenizer=tokenizer, vocab_size=size, tokens=tokens)
    return fmt, _encoded(config.data.source, fmt)


@functools.lru_cache(maxsize=4)
def _encoded(name: str, fmt: Format) -> dict[str, Arrays]:
    """All splits of a source as arrays: encoded once, whoever asks (checks, training, evaluation, benchmark). Not to be written to."""
    splits = sources.load(name).splits
    return {split: {**fmt.encode(examples.inputs), "label": examples.labels} for split, examples in splits.items()}


def train_iterator(
    arrays: Arrays, *, groups: int, instances: int, seed: int, host: int = 0, hosts: int = 1
) -> grain.DatasetIterator:
    """Endless training batches of `groups` x `instances` examples, all hosts together.

    Every epoch is a fresh permutation, cut into consecutive groups of `instances`; a batch may span two epochs, so no example
    is ever dropped.

    Args:
      arrays: one row an example.
      groups: `B`, over all hosts; divisible by `hosts`.
      instances: `N`.
      seed: of the permutations.
      host: this host's index.
      hosts: how many hosts share a batch.

    Returns:
      A checkpointable grain iterator over dicts of `[B / hosts, N, ...]` arrays, `weight` (all ones) included.
    """
    rows = len(arrays["mask"])
    size = groups * instances
    if groups % hosts:
        raise InputError(f"batch_groups = {groups} is not divisible by the number of hosts, {hosts}. Choose a multiple.")

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(rows)

    def batch(step: int) -> Arrays:
        position = np.arange(step * size, (step + 1) * size).reshape(hosts, groups // hosts, instances)[host]
        epochs, offsets = np.divmod(position, rows)
        index = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = order(int(epoch))[offsets[here]]
        return _gather(arrays, index, np.ones(index.shape, np.float32))

    steps = grain.MapDataset.range(2**31 - 1).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(
    arrays: Arrays, *, groups: int, instances: int, seed: int, shuffle: bool = True
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Every example exactly once, in random groups; rows that only fill up a group or a batch have weight 0.

    Fillers are copies of random examples, so that a ragged tail is mixed with real companions (the published code does the
    same).

    Args:
      arrays: one row an example.
      groups: `B`.
      instances: `N`.
      seed: decides who is mixed with whom.
      shuffle: False keeps the order: example `i` sits in slot `i % N` of group `i // N`.

    Yields:
      The examples' row numbers, `[B, N]`, and the batch.
    """
    rows = len(arrays["mask"])
    size = groups * instances
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows) if shuffle else np.arange(rows)
    fill = rng.integers(0, rows, size=-rows % size)
    index = np.concatenate([order, fill]).reshape(-1, groups, instances)
    weight = (np.arange(index.size) < rows).astype(np.float32).reshape(index.shape)
    for rows_BxN, weight_BxN in zip(index, weight, strict=True):
        yield rows_BxN, _gather(arrays, rows_BxN, weight_BxN)


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}".replace("\n", " ")


def _gather(arrays: Arrays, index: np.ndarray, weight: np.ndarray) -> Arrays:
    return {**{name: array[index] for name, array in arrays.items()}, "weight": weight}
