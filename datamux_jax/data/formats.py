"""How raw inputs become arrays: texts, pairs, words or features; saved with a run."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax import workdir
from datamux_jax.data import images, tokenizers
from datamux_jax.data.encoding import encode_pairs, encode_words
from datamux_jax.data.tokenizers import Tokenizer
from datamux_jax.errors import InputError
from datamux_jax.families import SpecialTokens

FORMAT = "format.json"
Arrays = dict[str, np.ndarray]


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


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}".replace("\n", " ")
