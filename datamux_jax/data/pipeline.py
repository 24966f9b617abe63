"""From examples to batches: `[B, N, ...]` groups, freshly drawn every epoch, in an order that depends on the seed alone.

Batch `k` is a pure function of `(seed, k)`, so a grain iterator's state is one number, and a resumed run sees exactly the
examples that an uninterrupted one would have seen. Each process reads its own groups of the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from datamux_jax import workdir
from datamux_jax.data import sources, tokenizers
from datamux_jax.data.buckets import Buckets, cut
from datamux_jax.data.corpus import CORPORA, open_corpus
from datamux_jax.data.examples import Source
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.data.token_cache import chunks, tokenised
from datamux_jax.errors import InputError

IN_BATCHES = ("inputs", "mask", "label", "teacher")  # What a device sees; `word` and `gold` are for people.
WINDOW = 32  # Training batches over which examples of similar length are gathered.
IGNORED = -100  # The label where there is nothing to predict.


def load(config: Any, run: Path | None = None) -> tuple[Format, dict[str, Arrays]]:
    """The format and the splits of the data that `config.data` names; see `format_of` and `splits_of`."""
    fmt = format_of(config, run)
    return fmt, splits_of(config, fmt)


def format_of(config: Any, run: Path | None = None) -> Format:
    """How the data that `config.data` names become arrays.

    Args:
      config: complete config.
      run: folder of the run; `data.tokenizer` may be relative to it.

    Raises:
      InputError: unknown names, data that cannot be read, or a length that does not fit the source.
    """
    data = config.data
    running = data.source in CORPORA
    sources.check(data)
    source = None if running else sources.load(data)
    first = None if source is None else next(iter(source.splits.values())).inputs
    if source is not None and isinstance(first, np.ndarray):
        length, width = (data.image_size, data.image_size) if data.image_size else first.shape[1:]
        kind = {"inputs": "features", "feature_size": width, "image_size": data.image_size, "pixels": True}
        fmt = Format(source.label_names, length, metrics=source.metrics, **kind)
        if data.length not in (0, fmt.length):
            raise InputError(
                f"data.length = {data.length}, but the source {data.source!r} has inputs of length {fmt.length}. "
                "Set data.length to 0 to take the source's own."
            )
        return fmt
    if data.length < 2:
        raise InputError(f"data.length = {data.length}, but a text needs at least 2 positions, [CLS] and one token. Raise it.")
    corpus = open_corpus(data) if running else None
    name = data.tokenizer if run is None else str(workdir.find(data.tokenizer, run))
    tokenizer = tokenizers.open_tokenizer(name, data, corpus)
    # Only the index demultiplexer feeds tokens that no text has.
    tokens, size = tokenizer.special_tokens(config.num_instances, config.model.family)
    inputs = "text" if first is None or isinstance(first[0], str) else "pair" if isinstance(first[0], tuple) else "words"
    return Format(
        source.label_names if source else (),
        data.length,
        token_labels=inputs == "words",
        inputs=inputs,
        metrics=source.metrics if source else (),
        written=source.written if source else (),
        tokenizer=tokenizer,
        vocab_size=size if config.demux.name == "index" else tokenizer.vocab_size,
        tokens=tokens,
        corpus=corpus.fingerprint if corpus else "",
    )


def splits_of(config: Any, fmt: Format) -> dict[str, Arrays]:
    """The examples of the data that `config.data` names: for each split the arrays of `Format.encode` and `label`, one row an example.

    Labels are classes `[n]` int32 or numbers `[n]` float32. Of words they are `[n, L]` int32: at the first token of each word its
    label, elsewhere `IGNORED`; and `gold` `[n, W]` has those of all words, also of those that the length cuts off, filled up with
    `IGNORED`.

    Running text has `inputs` alone: chunks of `fmt.length` tokens, mapped from the cache of tokenised text, which is made here if
    there is none yet.

    Raises:
      InputError: data that cannot be read, or a cache that cannot be written.
    """
    if not fmt.corpus:
        return _encoded(sources.load(config.data), fmt)
    assert fmt.tokenizer is not None
    tokens = tokenised(config.data, open_corpus(config.data), fmt.tokenizer)
    return {split: {"inputs": chunks(ids, fmt.length)} for split, ids in tokens.items()}


@functools.lru_cache(maxsize=4)
def _encoded(source: Source, fmt: Format) -> dict[str, Arrays]:
    """All splits of a source as arrays: encoded once, whoever asks (checks, training, evaluation, benchmark). Not to be written to."""
    return {split: _labelled(source, split, fmt) for split in source.splits}


def _labelled(source: Source, split: str, fmt: Format) -> Arrays:
    """The arrays of a split; says what the length cuts off (besides what an index prefix in place of the last tokens takes)."""
    examples = source.splits[split]
    arrays, cut = fmt.encode_cut(examples.inputs)
    if cut.any():
        what = "pairs of texts" if fmt.inputs == "pair" else "texts"
        _say(source, f"{split}: {cut.sum():,} of {len(cut):,} {what} are longer than {fmt.length} tokens, and cut.")
    if isinstance(examples.labels, np.ndarray):
        return {**arrays, "label": examples.labels}
    gold = np.full((len(examples), max(map(len, examples.labels))), IGNORED, np.int32)
    for row, labels in zip(gold, examples.labels, strict=True):
        row[: len(labels)] = labels
    word = arrays["word"]
    label = np.where(word < 0, IGNORED, np.take_along_axis(gold, np.maximum(word, 0), axis=1)).astype(np.int32)
    words, read = ((labels != IGNORED).sum() for labels in (gold, label))
    if read < words:
        why = f"they lie beyond {fmt.length} tokens, or the tokenizer leaves nothing of them"
        _say(source, f"{split}: {words - read:,} of {words:,} words are not read: {why}.")
    return {**arrays, "label": label, "gold": gold}


@functools.lru_cache(maxsize=64)
def _say(source: Source, text: str) -> None:
    """Prints what is to know of a source once, however many runs read it."""
    print(text, flush=True)


def train_iterator(
    arrays: Arrays,
    *,
    groups: int,
    instances: int,
    seed: int,
    mine: np.ndarray | None = None,
    buckets: Buckets | None = None,
) -> grain.DatasetIterator:
    """Endless training batches of `groups` x `instances` examples, all processes together.

    Every epoch is a fresh permutation, cut into consecutive groups of `instances`; a batch may span two epochs, so no example
    is ever dropped. With `buckets` the examples of a window, of up to `WINDOW` batches and one epoch, are dealt out anew: those of
    one bucket stand in the same batches, which come in random order and are cut to its length.

    Args:
      arrays: one row an example.
      groups: `B`, over all processes.
      instances: `N`.
      seed: of the permutations.
      mine: which groups of each batch this process reads (`sharding.local_groups`); default: all.
      buckets: of the examples; None: batches are never cut.

    Returns:
      A checkpointable grain iterator over dicts of `[groups of this process, N, ...]` arrays, `weight` (all ones) included. Its state
      is the number of the next batch, the same for every process and mesh.
    """
    total = len(arrays["inputs"])
    mine = np.arange(groups) if mine is None else mine
    batches = 1 if buckets is None else int(np.clip(total // (groups * instances), 1, WINDOW))

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(total)

    def examples(positions: np.ndarray) -> np.ndarray:
        """Row numbers at the given positions of the endless stream."""
        epochs, offsets = np.divmod(positions, total)
        index = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = order(int(epoch))[offsets[here]]
        return index

    @functools.lru_cache(maxsize=2)
    def window(number: int) -> np.ndarray:
        """Row numbers `[batches, B, N]` of the batches of a window."""
        size = batches * groups * instances
        index = examples(np.arange(number * size, (number + 1) * size))
        if buckets is None:
            return index.reshape(batches, groups, instances)
        index = buckets.sorted(index).reshape(batches, groups, instances)
        return np.random.default_rng((seed, number, 1)).permutation(index)

    def batch(step: int) -> Arrays:
        rows = window(step // batches)[step % batches]
        gathered = _gather(arrays, rows[mine], np.ones(rows[mine].shape, np.float32))
        return gathered if buckets is None else cut(gathered, buckets.length(rows))

    steps = grain.MapDataset.range(2**31 - 1).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(
    arrays: Arrays,
    *,
    groups: int,
    instances: int,
    seed: int,
    shuffle: bool = True,
    mine: np.ndarray | None = None,
    buckets: Buckets | None = None,
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
      mine: which groups of each batch this process reads; default: all.
      buckets: of the examples, whose groups are then random inside of a bucket, shortest first, and batches cut to its length; None:
        batches are never cut.

    Yields:
      The examples' row numbers, `[groups of this process, N]`, and the batch.
    """
    total = len(arrays["inputs"])
    mine = np.arange(groups) if mine is None else mine
    size = groups * instances
    rng = np.random.default_rng(seed)
    order = rng.permutation(total) if shuffle else np.arange(total)
    if buckets is not None:
        order = buckets.sorted(order)
    fill = rng.integers(0, total, size=-total % size)  # Behind the longest, whose rows hold any of them.
    index = np.concatenate([order, fill]).reshape(-1, groups, instances)
    weight = (np.arange(index.size) < total).astype(np.float32).reshape(index.shape)
    for rows_BxN, weight_BxN in zip(index, weight, strict=True):
        batch = _gather(arrays, rows_BxN[mine], weight_BxN[mine])
        yield rows_BxN[mine], batch if buckets is None else cut(batch, buckets.length(rows_BxN))


def _gather(arrays: Arrays, index: np.ndarray, weight: np.ndarray) -> Arrays:
    batch = {**{name: arrays[name][index] for name in IN_BATCHES if name in arrays}, "weight": weight}
    if "mask" not in batch:  # Chunks of running text: token ids in the smallest type that holds them, and no padding.
        batch["inputs"] = batch["inputs"].astype(np.int32)
        batch["mask"] = np.ones(batch["inputs"].shape, np.int32)
        batch["label"] = np.zeros(index.shape, np.int32)
    return batch
