"""From examples to batches: `[B, N, ...]` groups, freshly drawn every epoch, in an order that depends on the seed alone.

Batch `k` is a pure function of `(seed, k)`, so a grain iterator's state is one number, and a resumed run sees exactly the
examples that an uninterrupted one would have seen. Each process reads its own groups of the global batch.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from datamux_jax import workdir
from datamux_jax.data import images, sources, tokenizers
from datamux_jax.data.corpus import CORPORA, open_corpus
from datamux_jax.data.encoding import encode_pairs, encode_words
from datamux_jax.data.examples import Examples, Source
from datamux_jax.data.token_cache import chunks, tokenised
from datamux_jax.data.tokenizers import Tokenizer
from datamux_jax.errors import InputError
from datamux_jax.families import SpecialTokens

FORMAT = "format.json"
Arrays = dict[str, np.ndarray]
IN_BATCHES = ("inputs", "mask", "label", "teacher")  # What a device sees; `word` and `gold` are for people.
IGNORED = -100  # The label where there is nothing to predict.


def _strings(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and all(isinstance(text, str) for text in entry)


# Kind of input -> what an example is, for errors, and whether a value is one.
TEXT_INPUTS: dict[str, tuple[str, str, Callable[[Any], bool]]] = {
    "text": ("strings", "text", lambda entry: isinstance(entry, str)),
    "pair": ("pairs of strings", "(text, text)", lambda entry: _strings(entry) and len(entry) == 2),
    "words": ("lists of words", "[word, word]", lambda entry: _strings(entry) and len(entry) > 0),
}


@dataclasses.dataclass(frozen=True)
class Format:
    """How raw inputs become arrays; saved with a run, so that prediction needs nothing else.

    Attributes:
      label_names: class names, in label order.
      length: `L`.
      tokenizer: of texts; None for feature inputs.
      feature_size: `F` of feature inputs; 0 for text.
      vocab_size: `V` of the network, prefix tokens included; 0 for feature inputs.
      tokens: ids of the special tokens; None for feature inputs.
      token_labels: labels belong to tokens, not to examples.
      corpus: fingerprint of the running text that was cut into chunks; empty where examples are texts or features.
      inputs: what an example is: "text", "pair" of texts, "words", or "features".
      metrics: what is reported of predictions, keys of `task_metrics.METRICS`.
      image_size: pixels of a side that images are brought to; 0: features are taken as they are.
      pixels: features are pixels, from 0 to 1.
      written: the labels as the files of the data write them, in label order, where that is not their names (of SST-2: 0 and 1).
        Runs of earlier versions have not saved it; what a run reads and predicts is the same without.
    """

    label_names: tuple[str, ...]
    length: int
    tokenizer: Tokenizer | None = None
    feature_size: int = 0
    vocab_size: int = 0
    tokens: SpecialTokens | None = None
    token_labels: bool = False
    corpus: str = ""
    inputs: str = "text"
    metrics: tuple[str, ...] = ("accuracy",)
    image_size: int = 0
    pixels: bool = False
    written: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def save(self, run: Path) -> None:
        """Writes `format.json` and, for texts, the tokenizer into the folder of a run."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["tokenizer"] = self.tokenizer.fingerprint if self.tokenizer else ""
        fields["tokens"] = self.tokens and dataclasses.asdict(self.tokens)
        if self.tokenizer:
            self.tokenizer.save(run / tokenizers.RUN_FOLDER)
        workdir.write_json(run / FORMAT, fields)

    @staticmethod
    def saved_in(run: Path) -> bool:
        """Whether the folder holds a format."""
        return (run / FORMAT).exists()

    @classmethod
    def load(cls, run: Path) -> Format:
        """The format that was saved in the folder of a run.

        Raises:
          InputError: a file is missing, or is not what was saved.
        """
        fields = workdir.read_json(run / FORMAT)
        tokenizer = tokenizers.load(run / tokenizers.RUN_FOLDER) if fields["tokenizer"] else None
        if tokenizer and tokenizer.fingerprint != fields["tokenizer"]:
            raise InputError(
                f"The tokenizer in {run / tokenizers.RUN_FOLDER} is not the one that the run was trained with. Restore the folder from "
                "a copy."
            )
        tokens = fields["tokens"] and SpecialTokens(**fields["tokens"])
        lists = {name: tuple(fields[name]) for name in ("label_names", "metrics", "written") if name in fields}
        return cls(**{**fields, **lists, "tokens": tokens, "tokenizer": tokenizer})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one instance: `[L]` or `[L, F]`."""
        return (self.length,) if self.vocab_size else (self.length, self.feature_size)

    @property
    def input_dtype(self) -> np.dtype:
        return np.dtype(np.int32 if self.vocab_size else np.float32)

    @property
    def numbers(self) -> bool:
        """Whether labels are numbers, and not classes."""
        return not self.label_names and not self.corpus

    def encode(self, inputs: Any) -> Arrays:
        """Arrays of texts, pairs of texts, words, or features `[n, L, F]`, as `self.inputs` says; see `encode_cut`."""
        return self.encode_cut(inputs)[0]

    def encode_cut(self, inputs: Any) -> tuple[Arrays, np.ndarray]:
        """Arrays of texts, pairs of texts, words, or features `[n, L, F]`, as `self.inputs` says.

        Returns:
          `inputs` and `mask` `[n, L]` (features: `inputs` `[n, L, F]`); of words besides `word` `[n, L]`, the number of the word whose
          first token stands there, elsewhere -1. And whether a text or a pair was longer and its end was cut off, `[n]` bool.

        Raises:
          InputError: the inputs are not what this format reads.
        """
        if self.vocab_size and not self.tokenizer:
            raise InputError(
                "This run was converted from a checkpoint whose folder had no tokenizer, so it reads no texts. Put vocab.txt or "
                "tokenizer.json beside the weights and convert again."
            )
        if self.tokenizer:
            return self._encode_texts(self.tokenizer, inputs)
        try:
            features = np.asarray(inputs, np.float32)
        except (TypeError, ValueError):
            features = np.empty(0, np.float32)
        if self.image_size and features.ndim == 3 and features.size:
            features = images.fitted(features, self.image_size)
        if features.ndim != 3 or features.shape[1:] != self.input_shape:
            raise InputError(
                f"This model reads feature arrays of shape [n, {self.length}, {self.feature_size}], but got "
                f"{'shape ' + str(list(features.shape)) if features.ndim > 1 else 'something else'}. Reshape the inputs, or load "
                "a model that was trained on text."
            )
        if problem := self.problem(features):
            way_out = "Remove or replace it first."
            if np.isfinite(features).all():
                way_out = "Divide by the largest value that a pixel can have, such as 255 for bytes."
            raise InputError(f"One of the inputs {problem}, and one such input spoils its whole group. {way_out}")
        return {"inputs": features, "mask": np.ones(features.shape[:2], np.int32)}, np.zeros(len(features), bool)

    def problem(self, features: np.ndarray) -> str:
        """What is wrong with the values of features, as an end of a sentence; nothing: ""."""
        if not np.isfinite(features).all():
            return "holds a NaN or an infinity"
        if self.pixels and features.size and not 0 <= features.min() <= features.max() <= 1:
            return f"has pixels from {features.min():g} to {features.max():g}, where 0 (background) to 1 are read"
        return ""

    def _encode_texts(self, tokenizer: Tokenizer, inputs: Any) -> tuple[Arrays, np.ndarray]:
        what, example, fits = TEXT_INPUTS[self.inputs]
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            raise InputError(f"This model reads a list of {what}, but got {_short(inputs)}. Pass a list: [{example}, ...].")
        for entry in inputs:
            if not fits(entry):
                raise InputError(
                    f"This model reads a list of {what}, but an entry is {_short(entry)}. Pass {what} only: [{example}, ...]."
                )
        if self.inputs == "pair":
            ids, mask, cut = encode_pairs(tokenizer, inputs, self.length)
        elif self.inputs == "words":
            ids, mask, word = encode_words(tokenizer, inputs, self.length)
            return {"inputs": ids, "mask": mask, "word": word}, np.zeros(len(ids), bool)
        else:
            ids, mask, cut = tokenizer.encode(list(inputs), self.length)
        return {"inputs": ids, "mask": mask}, cut


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
    return {split: _labelled(examples, fmt, split) for split, examples in source.splits.items()}


def _labelled(examples: Examples, fmt: Format, split: str) -> Arrays:
    """The arrays of a split; says what its length cuts off."""
    arrays, cut = fmt.encode_cut(examples.inputs)
    if cut.any():
        what = "pairs of texts" if fmt.inputs == "pair" else "texts"
        print(f"{split}: {cut.sum():,} of {len(cut):,} {what} are longer than {fmt.length} tokens, and cut.", flush=True)
    if isinstance(examples.labels, np.ndarray):
        return {**arrays, "label": examples.labels}
    gold = np.full((len(examples), max(map(len, examples.labels))), IGNORED, np.int32)
    for row, labels in zip(gold, examples.labels, strict=True):
        row[: len(labels)] = labels
    word = arrays["word"]
    label = np.where(word < 0, IGNORED, np.take_along_axis(gold, np.maximum(word, 0), axis=1))
    if beyond := (gold != IGNORED).sum() - (label != IGNORED).sum():
        words = (gold != IGNORED).sum()
        print(f"{split}: {beyond:,} of {words:,} words lie beyond {fmt.length} tokens, and are not read.", flush=True)
    return {**arrays, "label": label.astype(np.int32), "gold": gold}


def train_iterator(
    arrays: Arrays, *, groups: int, instances: int, seed: int, mine: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Endless training batches of `groups` x `instances` examples, all processes together.

    Every epoch is a fresh permutation, cut into consecutive groups of `instances`; a batch may span two epochs, so no example
    is ever dropped.

    Args:
      arrays: one row an example.
      groups: `B`, over all processes.
      instances: `N`.
      seed: of the permutations.
      mine: which groups of each batch this process reads (`sharding.local_groups`); default: all.

    Returns:
      A checkpointable grain iterator over dicts of `[groups of this process, N, ...]` arrays, `weight` (all ones) included. Its state
      is the number of the next batch, the same for every process and mesh.
    """
    rows = len(arrays["inputs"])
    mine = np.arange(groups) if mine is None else mine

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(rows)

    def batch(step: int) -> Arrays:
        position = ((step * groups + mine) * instances)[:, None] + np.arange(instances)
        epochs, offsets = np.divmod(position, rows)
        index = np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = order(int(epoch))[offsets[here]]
        return _gather(arrays, index, np.ones(index.shape, np.float32))

    steps = grain.MapDataset.range(2**31 - 1).map(batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(
    arrays: Arrays, *, groups: int, instances: int, seed: int, shuffle: bool = True, mine: np.ndarray | None = None
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

    Yields:
      The examples' row numbers, `[groups of this process, N]`, and the batch.
    """
    rows = len(arrays["inputs"])
    mine = np.arange(groups) if mine is None else mine
    size = groups * instances
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows) if shuffle else np.arange(rows)
    fill = rng.integers(0, rows, size=-rows % size)
    index = np.concatenate([order, fill]).reshape(-1, groups, instances)
    weight = (np.arange(index.size) < rows).astype(np.float32).reshape(index.shape)
    for rows_BxN, weight_BxN in zip(index[:, mine], weight[:, mine], strict=True):
        yield rows_BxN, _gather(arrays, rows_BxN, weight_BxN)


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}".replace("\n", " ")


def _gather(arrays: Arrays, index: np.ndarray, weight: np.ndarray) -> Arrays:
    batch = {**{name: arrays[name][index] for name in IN_BATCHES if name in arrays}, "weight": weight}
    if "mask" not in batch:  # Chunks of running text: token ids in the smallest type that holds them, and no padding.
        batch["inputs"] = batch["inputs"].astype(np.int32)
        batch["mask"] = np.ones(batch["inputs"].shape, np.int32)
        batch["label"] = np.zeros(index.shape, np.int32)
    return batch
