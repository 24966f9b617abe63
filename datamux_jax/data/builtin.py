"""Data sets that installed packages ship; both are offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from datamux_jax.data import images
from datamux_jax.data.examples import Examples, Source, hash_fraction


def digits(validation_examples: int = 0) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8: a sequence of 8 rows of 8 pixels in [0, 1].

    Split 80/20 into `train` and `test` by a hash of the index; the last `validation_examples` of `train` are `validation`.
    """
    from sklearn.datasets import load_digits  # Heavy import, needed by this source alone.

    raw = load_digits()
    rows = (raw.images / 16.0).astype(np.float32)
    labels = raw.target.astype(np.int32)
    train = np.array([hash_fraction(f"digits/{i}") < 0.8 for i in range(len(labels))])
    splits = {"train": Examples(rows[train], labels[train]), "test": Examples(rows[~train], labels[~train])}
    return Source(images.held_out(splits, validation_examples), tuple(str(d) for d in range(10)))


_LANGUAGES = "en de fr es it pt nl sv da nb fi et lv lt pl cs sk sl hr hu ro tr id sw eu ca is ga cy sq"
CLDR_LANGUAGES = tuple(_LANGUAGES.split())
CLDR_SECTIONS = (
    "languages",
    "territories",
    "scripts",
    "currency_names",
    "variants",
    "unit_display_names",
    "currency_names_plural",
    "measurement_systems",
    "date_fields",
    "months",
    "days",
    "quarters",
    "eras",
)


def cldr() -> Source:
    """Language identification of short phrases: Unicode CLDR display names in 30 languages, through `babel`.

    Phrases have at least 4 characters, a letter, and no placeholder; one that occurs, case-insensitively, in more than one of
    the languages is dropped. About 15 bytes long. Split 80/10/10 into `train`, `validation` and `test` by a hash of the phrase.
    """
    from babel import Locale  # Heavy import, needed by this source alone.

    spelling: dict[str, str] = {}
    languages: dict[str, set[int]] = {}
    for label, language in enumerate(CLDR_LANGUAGES):
        # babel offers no public way to walk all display strings of a locale; `_data` is the CLDR tree itself.
        data = Locale(language)._data
        for section in CLDR_SECTIONS:
            for phrase in map(str.strip, _leaves(data.get(section, ""))):
                if len(phrase) >= 4 and "{" not in phrase and any(map(str.isalpha, phrase)):
                    folded = phrase.casefold()
                    spelling.setdefault(folded, phrase)
                    languages.setdefault(folded, set()).add(label)
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for folded in sorted(spelling):
        if len(languages[folded]) == 1:
            fraction = hash_fraction(f"cldr/{folded}")
            name = "train" if fraction < 0.8 else "validation" if fraction < 0.9 else "test"
            rows[name].append((spelling[folded], next(iter(languages[folded]))))
    splits = {
        name: Examples([text for text, _ in pairs], np.array([label for _, label in pairs], np.int32))
        for name, pairs in rows.items()
    }
    return Source(splits, CLDR_LANGUAGES)


def _leaves(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif hasattr(node, "items"):
        for _, value in node.items():
            yield from _leaves(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _leaves(value)
