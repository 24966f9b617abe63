"""Pairs of texts, and lists of words, as token ids with any tokenizer; single texts are encoded by the tokenizer itself.

The layouts are the published ones (BERT: Devlin et al. 2018, RoBERTa: Liu et al. 2019), cut as the fast tokenizers of Hugging Face
cut; token types are not told apart, as in the published multiplexed models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamux_jax.data.frames import padded
from datamux_jax.data.tokenizers import Tokenizer
from datamux_jax.errors import InputError


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `[CLS] a [SEP] b [SEP]`, with two [SEP] in the middle for RoBERTa's vocabularies, and none at the end for bytes.

    The end of the longer text is cut off until both fit, or until they are equally long; then both are cut, and the second one keeps
    the odd token.

    Args:
      tokenizer: what encodes the texts.
      pairs: two texts each.
      length: `L`.

    Returns:
      Token ids and mask, both `[n, L]` int32, and whether anything was cut off, `[n]` bool.

    Raises:
      InputError: `length` has no room for a token of each text.
    """
    frame = tokenizer.frame
    room = length - len(frame.start) - len(frame.between) - len(frame.end)
    if room < 2:
        raise InputError(
            f"data.length = {length}, but a pair of texts needs at least {length - room + 2} positions: special tokens and a token of "
            "each text. Raise it."
        )
    rows, cut = [], []
    seconds = tokenizer.pieces([second for _, second in pairs])
    for first, second in zip(tokenizer.pieces([first for first, _ in pairs]), seconds, strict=True):
        a, b = _shares(len(first), len(second), room)
        rows.append([*frame.start, *first[:a], *frame.between, *second[:b], *frame.end])
        cut.append(len(first) + len(second) > room)
    return *padded(rows, length, frame.pad), np.array(cut, bool)


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens each of two texts keeps."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


def encode_words(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows `[CLS] piece piece ... [SEP]` of words that are encoded each on its own; bytes have a space between words.

    Args:
      tokenizer: what encodes the words.
      sentences: words each.
      length: `L`; what is longer is cut so that its `[SEP]` stays.

    Returns:
      Token ids and mask, and at the position of the first token of each word its number in the sentence, elsewhere -1; all `[n, L]`
      int32. Words that are cut off, or of which the tokenizer leaves nothing, have no position.

    Raises:
      InputError: `length` has no room for a token.
    """
    frame = tokenizer.frame
    room = length - len(frame.start) - len(frame.end)
    if room < 1:
        raise InputError(
            f"data.length = {length}, but words need at least {length - room + 1} positions: special tokens and one token. Raise it."
        )
    different = list({word: None for words in sentences for word in words})
    pieces = dict(zip(different, tokenizer.word_pieces(different), strict=True))
    rows = []
    numbers = np.full((len(sentences), length), -1, np.int32)
    for row, words in enumerate(sentences):
        ids: list[int] = []
        for number, word in enumerate(words):
            ids += frame.space if ids else ()
            if len(ids) >= room:
                break
            if len(pieces[word]):
                numbers[row, len(frame.start) + len(ids)] = number
                ids += pieces[word]
        rows.append([*frame.start, *ids[:room], *frame.end])
    return *padded(rows, length, frame.pad), numbers
