"""From inputs to predictions, whoever computes the logits: a run (`predict.py`) or an exported program (`exported.py`).

This module and what it imports know nothing of the network: texts are encoded, grouped (`grouping.py`), handed over in batches of
few shapes, and the logits that come back are put into the order of the inputs.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from datamux_jax import grouping
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.errors import InputError

WINDOW = 4096  # Inputs that are sorted by length together, rounded up to whole batches.
CHARACTERS = 64  # Of a text, looked at for each position of a row: an enormous text costs no more than a long one.
OBJECTIVES = ("classification", "regression", "tagging")


class Prediction(NamedTuple):
    """The most probable label, its probability, and the probabilities of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Window:
    """Encoded inputs that are grouped together.

    Attributes:
      arrays: `inputs` `[n, L]` or `[n, L, F]`, `mask` `[n, L]`, and of words `word` `[n, L]`.
      sizes: positions that each input needs, `[n]`.
      truncated: true where an input is longer than a row and its end was cut off, `[n]`.
      words: number of words of each input, `[n]`; None where inputs are no words.
    """

    arrays: Arrays
    sizes: np.ndarray
    truncated: np.ndarray
    words: np.ndarray | None

    def __len__(self) -> int:
        return len(self.sizes)


class Inference(abc.ABC):
    """Predictions for any number of inputs, `N` of them in one row, in few compiled shapes.

    Inputs of similar length share a row, which is cut to the smallest of the lengths 16, 32, ... `L` that holds them (`buckets`). A
    ragged tail is filled up with copies of others, whose predictions are dropped. Predictions depend on the inputs and their order
    alone, and are the same whether they come in one call or, in multiples of `window`, in several.

    Who is mixed with whom changes predictions a little. The length of a row changes nothing but rounding: padding of all instances is
    masked. Exceptions are networks whose attention sees it as in the published code (`mux.attend_padding`), and the multiplexer
    `gaussian_attention`: a shorter row has less of it, which changes their predictions a little too.

    Attributes:
      format: how inputs become arrays.
      objective: "classification", "regression" or "tagging".
      instances: `N`.
      groups: `B` of every batch.
      cut: positions that an index prefix takes from the end of every row.
      identity: text that is another one for other parameters.
    """

    def __init__(self, fmt: Format, objective: str, *, instances: int, groups: int, cut: int, identity: str) -> None:
        self.format = fmt
        self.objective = objective
        self.instances = instances
        self.groups = groups
        self.cut = cut
        self.identity = identity
        self.lengths = grouping.bucket_lengths(fmt.length) if fmt.vocab_size else (fmt.length,)

    @abc.abstractmethod
    def dispatch(self, inputs: np.ndarray, mask: np.ndarray) -> Any:
        """Starts the network on `[B, N, l]` inputs and mask; what it returns is an array of logits once asked for by numpy.

        The logits are `[B, N, C]`, for tagging `[B, N, l', C]` with `l' = l - cut`.
        """

    @property
    def batch_size(self) -> int:
        """Inputs that one call of the compiled function takes."""
        return self.groups * self.instances

    @property
    def window(self) -> int:
        """Inputs that are sorted by length together."""
        return -(-WINDOW // self.batch_size) * self.batch_size

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of `probabilities`; none for regression."""
        return self.format.label_names

    def encode(self, inputs: Any) -> Window:
        """Inputs as arrays; of a text, only the first 64 characters a position are looked at.

        Raises:
          InputError: the inputs are not what the model reads.
        """
        fmt = self.format
        if not fmt.vocab_size:
            arrays = fmt.encode(inputs)
            n = len(arrays["inputs"])
            return Window(arrays, np.full(n, fmt.length), np.zeros(n, bool), None)
        clipped, shortened = self._clip(inputs)
        arrays, cut = fmt.encode_cut(clipped)
        sizes = arrays["mask"].sum(-1)
        room = fmt.length - self.cut
        if fmt.inputs == "words":
            words = np.array([len(words) for words in inputs])
            last = arrays["word"][:, :room].max(-1, initial=-1)
            return Window(arrays, self._needed(sizes), (last < words - 1) & (sizes >= room), words)
        return Window(arrays, self._needed(sizes), cut | np.array(shortened, bool) | (sizes > room), None)

    def _needed(self, sizes: np.ndarray) -> np.ndarray:
        return np.minimum(sizes + self.cut, self.format.length)

    def _clip(self, inputs: Any) -> tuple[Any, list[bool]]:
        """Inputs without what is far behind the end of a row, and which lost something. Wrong inputs pass: encoding names them."""
        limit = CHARACTERS * self.format.length
        if not isinstance(inputs, list | tuple):
            return inputs, []

        def clip(value: Any) -> Any:
            if isinstance(value, list | tuple):
                parts = [clip(part) for part in value[:limit]]
                return parts if isinstance(value, list) else tuple(parts)
            return value[:limit] if isinstance(value, str) else value

        clipped = [clip(value) for value in inputs]
        return clipped, [a is not b and a != b for a, b in zip(clipped, inputs, strict=True)]

    def outputs(self, windows: Iterable[Window], *, ensemble: int = 1, buckets: bool = True) -> Iterator[Any]:
        """Logits of each window, in order, as `logits` returns them.

        A batch is fetched after the next one was started, across windows too: the device does not wait.
        """
        grouping.check_ensemble(ensemble, self.instances)
        pending: tuple[_Sink, grouping.Batch, Any, bool] | None = None
        for window in windows:
            sink = _Sink(window, ensemble, self._classes(), self.format.length - self.cut)
            lengths = self.lengths if buckets else self.lengths[-1:]
            plan = list(
                grouping.batches(window.sizes, groups=self.groups, instances=self.instances, lengths=lengths, ensemble=ensemble)
            )
            for number, batch in enumerate(plan, start=1):
                inputs, mask = (window.arrays[name][:, : batch.length][batch.rows] for name in ("inputs", "mask"))
                started = sink, batch, self.dispatch(inputs, mask), number == len(plan)
                if pending:
                    yield from _finish(*pending)
                pending = started
            if not plan:
                if pending:
                    yield from _finish(*pending)
                pending = None
                yield sink.total
        if pending:
            yield from _finish(*pending)

    def _classes(self) -> int:
        return 1 if self.objective == "regression" else len(self.labels)

    def logits(self, inputs: Any, *, ensemble: int = 1, buckets: bool = True) -> Any:
        """What the network says, in input order.

        Args:
          inputs: texts, pairs of texts, lists of words, or features `[n, L, F]`: what the model was trained on.
          ensemble: `k`, a divisor of `N`: every input is fed `k` times, in different slots and groups, and the logits are averaged
            (MUX-PLMs, "ensembling"); `k` times the work, for accuracy.
          buckets: False pads all rows to `L`.

        Returns:
          `[n, C]`, float32; regression: `[n, 1]`; tagging: a list of arrays `[words, C]`, with NaN for words that were cut off.

        Raises:
          InputError: the inputs are not what the model reads, or `ensemble` does not divide `N`.
        """
        grouping.check_ensemble(ensemble, self.instances)
        rows = (
            inputs.ndim > 0 if isinstance(inputs, np.ndarray) else isinstance(inputs, Sequence) and not isinstance(inputs, str)
        )
        if rows and len(inputs) == 0:
            return [] if self.objective == "tagging" else np.zeros((0, self._classes()), np.float32)
        if not rows or not self.format.vocab_size:
            inputs = self.format.encode(inputs)["inputs"]  # Refuses what has no rows.
        windows = (self.encode(inputs[start : start + self.window]) for start in range(0, len(inputs), self.window))
        parts = list(self.outputs(windows, ensemble=ensemble, buckets=buckets))
        return [rows for part in parts for rows in part] if self.objective == "tagging" else np.concatenate(parts)

    def probabilities(self, inputs: Any, *, ensemble: int = 1, buckets: bool = True) -> np.ndarray:
        """Class probabilities `[n, C]`, in input order; arguments and errors as `logits`.

        Raises:
          InputError: this is no classifier of whole inputs.
        """
        if self.objective != "classification":
            raise InputError(
                f"This is a model for {self.objective}, which gives no probabilities of classes. Call it, or use logits()."
            )
        return softmax(self.logits(inputs, ensemble=ensemble, buckets=buckets))

    def __call__(self, inputs: Any, *, ensemble: int = 1, buckets: bool = True) -> list[Any]:
        """Predictions in input order; arguments and errors as `logits`.

        Returns:
          Classification: a list of `Prediction`. Regression: a list of numbers. Tagging: for each input a list with the tag of every
          word, None for words that were cut off.
        """
        return self.answers(self.logits(inputs, ensemble=ensemble, buckets=buckets))

    def answers(self, logits: Any) -> list[Any]:
        """Logits, as `logits` returns them, read as `__call__` says."""
        if self.objective == "regression":
            return [float(value) for value in logits[:, 0]]
        if self.objective == "tagging":
            return [[None if np.isnan(word[0]) else self.labels[word.argmax()] for word in words] for words in logits]
        rows = softmax(logits)
        return [
            Prediction(self.labels[best], float(row[best]), dict(zip(self.labels, map(float, row), strict=True)))
            for row, best in zip(rows, rows.argmax(-1), strict=True)
        ]


class _Sink:
    """Collects the logits of one window."""

    def __init__(self, window: Window, ensemble: int, classes: int, length: int) -> None:
        self.share = np.float32(1 / ensemble)
        self.word = None if window.words is None else window.arrays["word"][:, :length]
        self.total: Any = np.zeros((len(window), classes), np.float32)
        if self.word is not None and window.words is not None:
            self.total = [np.full((count, classes), np.nan, np.float32) for count in window.words]
            for total, word in zip(self.total, self.word, strict=True):
                total[word[word >= 0]] = 0

    def add(self, batch: grouping.Batch, logits: np.ndarray) -> None:
        rows, states = batch.rows[batch.real], logits[batch.real] * self.share
        if self.word is None:
            self.total[rows] += states
            return
        for row, state in zip(rows, states, strict=True):
            word = self.word[row, : len(state)]
            self.total[row][word[word >= 0]] += state[word >= 0]


def _finish(sink: _Sink, batch: grouping.Batch, started: Any, last: bool) -> Iterator[Any]:
    sink.add(batch, np.asarray(started))
    if last:
        yield sink.total


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(-1, keepdims=True)
