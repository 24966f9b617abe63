"""Plain references that need no network, so that a report says what the task is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datamux_jax.data import sources
from datamux_jax.errors import InputError


def char_tfidf(config: Any, split: str) -> dict[str, Any]:
    """Character n-grams (1 to 4, within word boundaries), TF-IDF, logistic regression, on the same splits.

    Args:
      config: of a run on a text source.
      split: to score.

    Returns:
      `name`, and `accuracy` on `split`.
    """
    # Heavy imports, needed here alone.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    source = sources.load(config.data)
    train, test = source.split(config.data.train_split), source.split(split)
    if not isinstance(train.inputs, list) or not isinstance(train.inputs[0], str):
        raise InputError(
            f"baseline = 'char_tfidf' classifies single texts, but data.source = {config.data.source!r} has other inputs. Drop it."
        )
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10.0, max_iter=200)
    model.fit(vectors.fit_transform(train.inputs), train.labels)
    accuracy = float(model.score(vectors.transform(test.inputs), test.labels))
    return {"name": "character n-grams (1-4), TF-IDF, logistic regression", "accuracy": accuracy}


BASELINES: dict[str, Callable[[Any, str], dict[str, Any]]] = {"char_tfidf": char_tfidf}
