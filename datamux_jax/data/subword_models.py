"""BERT's WordPiece and RoBERTa's byte-pair encoding as objects of the `tokenizers` library: published, or trained. Table `TRAINERS`.

Training is by the library's own trainers. The same text gives the same tokenizer, on every machine and in every process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from datamux_jax.errors import InputError

Texts = Callable[[], Iterable[str]]

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MAX_ALPHABET = 1000  # Characters that stand in a WordPiece vocabulary by themselves; as in BERT, rarer ones are unknown.
MIN_FREQUENCY = 2  # Rarer pieces are not joined.


def train(kind: str, texts: Texts, vocab_size: int, lowercase: bool) -> str:
    """Trains a tokenizer.

    Args:
      kind: key of `TRAINERS`.
      texts: gives the training texts from the start; called once or twice.
      vocab_size: largest number of tokens; a small text gives fewer.
      lowercase: lower-case all text; WordPiece strips accents then too, as BERT does.

    Returns:
      The content of a `tokenizer.json`.

    Raises:
      InputError: the special tokens and single characters alone are more than `vocab_size`.
    """
    tokenizer = TRAINERS[kind](texts, max(vocab_size, 0), lowercase)
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise InputError(
            f"data.vocab_size = {vocab_size} is too small for a {kind} tokenizer of this text: its special tokens and single "
            f"characters alone are {size}. Raise it."
        )
    return tokenizer.to_str()


def read_vocab_txt(path: Path, lowercase: bool) -> str:
    """A BERT vocabulary, one token a line, as the content of a `tokenizer.json`.

    A `tokenizer_config.json` beside it, which published checkpoints have, knows better than `lowercase`.

    Raises:
      OSError, ValueError: a file cannot be read.
    """
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    settings: dict[str, Any] = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    published = path.with_name("tokenizer_config.json")
    if published.is_file():
        settings |= json.loads(published.read_text(encoding="utf-8"))
    normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    return bert_tokenizer({token: number for number, token in enumerate(tokens)}, normalizer).to_str()


def read_merges(vocab_json: Path) -> str:
    """RoBERTa's `vocab.json` and the `merges.txt` beside it as the content of a `tokenizer.json`.

    Raises:
      Exception: the library cannot read them; it has no exception of its own.
    """
    vocabulary, merges = models.BPE.read_file(str(vocab_json), str(vocab_json.with_name("merges.txt")))
    tokenizer = roberta_tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([token for token in roberta_tokens() if token.content in vocabulary])
    return tokenizer.to_str()


def bert_tokenizer(vocabulary: dict[str, int], normalizer: normalizers.BertNormalizer) -> tokenizers.Tokenizer:
    """BERT's WordPiece over a vocabulary, token -> id."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # Only those that are there: others would be given new ids.
    tokenizer.add_special_tokens([token for token in BERT_TOKENS if token in vocabulary])
    return tokenizer


def roberta_tokenizer(model: models.BPE, lowercase: bool = False) -> tokenizers.Tokenizer:
    """RoBERTa's byte-level byte-pair encoding; special tokens are still to be added."""
    tokenizer = tokenizers.Tokenizer(model)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def roberta_tokens() -> list[tokenizers.AddedToken]:
    """RoBERTa's special tokens; its mask takes the space before it along."""
    return [tokenizers.AddedToken(token, lstrip=token == "<mask>", special=True) for token in ROBERTA_TOKENS]


def _train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    """The library's trainer numbers `##`-characters in the order of a hash map, which differs from process to process, and breaks
    ties by these numbers; it cuts the alphabet in such an order too. So both are settled here: the alphabet is counted first, and
    the `##`-characters go in as if they were special tokens, which are numbered in the order given."""
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer = bert_tokenizer({}, normalizer)
    alphabet = _alphabet(texts(), normalizer)
    inside = [f"##{letter}" for letter in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + letter)) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*BERT_TOKENS, *inside],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return bert_tokenizer(tokenizer.get_vocab(), normalizer)


def _alphabet(texts: Iterable[str], normalizer: normalizers.BertNormalizer) -> list[str]:
    """The most frequent characters of the normalised texts, in the order of their code points."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for letter, count in raw.items():  # BERT's normaliser treats every character by itself.
        for normal in normalizer.normalize_str(letter):
            counts[normal] += count
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:MAX_ALPHABET])


def _train_bpe(texts: Texts, vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=roberta_tokens(),
        show_progress=False,
    )
    tokenizer = roberta_tokenizer(models.BPE(), lowercase)
    tokenizer.train_from_iterator(iter(texts()), trainer)
    return tokenizer


TRAINERS: dict[str, Callable[[Texts, int, bool], tokenizers.Tokenizer]] = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}
