"""What a benchmark feeds: raw inputs that fill their rows, and batches of them. No data set is needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from datamux_jax.data import builtin, subword_models, tokenizers
from datamux_jax.data.corpus import CORPORA
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.data.pipeline import IGNORED, format_of

# Classes of a network whose labels come from no data: as many as SST-2 and CoNLL-2003 have. Regression has none.
CLASSES = {"classification": 2, "tagging": 9}


def format_for(config: Any) -> Format:
    """How the network of `config` reads inputs.

    It is that of the config's data, unless these are running text or the tokenizer is one that is trained: then nothing is read, the
    tokenizer is trained on the phrases of `builtin.cldr`, and the vocabulary is as large as `data.vocab_size` says.

    Raises:
      InputError: data or a tokenizer that cannot be read.
    """
    data = config.data
    trained = data.tokenizer in subword_models.TRAINERS
    if not trained and data.source not in CORPORA:
        return format_of(config)
    tokenizer = (
        _trained(data.tokenizer, data.vocab_size, data.lowercase)
        if trained
        else tokenizers.open_tokenizer(data.tokenizer, data)
    )
    tokens, size = tokenizer.special_tokens(config.num_instances, config.model.family)
    needed = size if config.demux.name == "index" else tokenizer.vocab_size
    tagging = config.objective == "tagging"
    return Format(
        tuple(map(str, range(CLASSES.get(config.objective, 0)))),
        data.length,
        tokenizer=tokenizer,
        # A small text trains fewer pieces than asked for; the network is as large as with all of them.
        vocab_size=max(needed, data.vocab_size) if trained else needed,
        tokens=tokens,
        token_labels=tagging,
        corpus="none" if config.objective not in (*CLASSES, "regression") else "",
        inputs="words" if tagging else "text",
    )


@functools.lru_cache(maxsize=4)
def _trained(kind: str, vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    phrases = builtin.cldr().split("train").inputs
    return tokenizers.SubwordTokenizer.parse(
        subword_models.train(kind, lambda: map(str, phrases), vocab_size, lowercase), "of the benchmark"
    )


def raw_inputs(fmt: Format, count: int) -> Any:
    """`count` inputs as a user has them: texts, pairs or lists of words, made of English phrases (Unicode CLDR), or features.

    Every one fills its row: nothing is saved by shorter rows, and no position is padding.

    Raises:
      InputError: the format has no tokenizer.
    """
    rng = np.random.default_rng(0)
    if not fmt.vocab_size:
        return rng.random((count, *fmt.input_shape), np.float32)
    if not fmt.tokenizer:
        fmt.encode([])  # Says what is missing.
    assert fmt.tokenizer is not None
    source = builtin.cldr().split("train")
    english = [str(text) for text, label in zip(source.inputs, source.labels, strict=True) if label == 0]
    sizes = [len(pieces) for pieces in fmt.tokenizer.pieces(english)]

    def filled() -> str:
        chosen: list[str] = []
        tokens = 0
        while tokens < fmt.length:
            number = int(rng.integers(len(english)))
            chosen.append(english[number])
            tokens += sizes[number]
        return " ".join(chosen)

    if fmt.inputs == "pair":
        return [(filled(), filled()) for _ in range(count)]
    return [filled().split() if fmt.inputs == "words" else filled() for _ in range(count)]


def batch(fmt: Format, raw: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Arrays:
    """Raw inputs as the batch that a step takes; labels are drawn at random.

    Args:
      fmt: how inputs become arrays.
      raw: as many inputs as the batch has.
      shapes: of the batch, those of `Plan.batch_shapes` that are needed; `[B, N, ...]` each.
    """
    arrays = fmt.encode(raw)
    rng = np.random.default_rng(1)
    made: Arrays = {}
    for name, wanted in shapes.items():
        if name in ("inputs", "mask"):
            made[name] = arrays[name].reshape(wanted.shape)
        elif name == "label":
            label = rng.integers(max(1, len(fmt.label_names)), size=wanted.shape)
            made[name] = np.where(arrays["word"].reshape(wanted.shape) < 0, IGNORED, label) if fmt.token_labels else label
        else:  # Weights, and the outputs of a teacher.
            made[name] = np.ones(wanted.shape)
        made[name] = made[name].astype(wanted.dtype)
    return made
