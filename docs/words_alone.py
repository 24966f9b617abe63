"""What words without their context give on the tasks of docs/tasks.md: python docs/words_alone.py data.

`data` is a folder with the folders sst2, cola, rte, stsb and ud_ewt.
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from configs import glue, tagging
from datamux_jax import task_metrics
from datamux_jax.data import sources
from datamux_jax.data.examples import Source


def bag_of_words(source: Source) -> np.ndarray:
    """Classes by logistic regression on words, of pairs on those of both texts together."""
    train, test = source.splits["train"], source.splits["validation"]
    words = TfidfVectorizer(sublinear_tf=True)
    texts = [[one if isinstance(one, str) else " ".join(one) for one in split.inputs] for split in (train, test)]
    model = LogisticRegression(C=10.0, max_iter=500).fit(words.fit_transform(texts[0]), train.labels)
    return model.predict(words.transform(texts[1]))


def overlap(source: Source) -> np.ndarray:
    """How similar the words of both texts are: the cosine of their TF-IDF vectors."""
    words = TfidfVectorizer(sublinear_tf=True).fit([text for pair in source.splits["train"].inputs for text in pair])
    first, second = (words.transform(texts) for texts in zip(*source.splits["validation"].inputs, strict=True))
    return np.asarray(first.multiply(second).sum(1))[:, 0]


def commonest_tag(source: Source) -> float:
    """Accuracy of every word's commonest tag; of unseen words, of the commonest tag of all."""
    counts: collections.defaultdict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    every: collections.Counter[int] = collections.Counter()
    for words, tags in zip(source.splits["train"].inputs, source.splits["train"].labels, strict=True):
        for word, tag in zip(words, tags, strict=True):
            counts[word][int(tag)] += 1
            every[int(tag)] += 1
    usual = every.most_common(1)[0][0]
    right = [
        (counts[word].most_common(1)[0][0] if word in counts else usual) == tag
        for words, tags in zip(source.splits["validation"].inputs, source.splits["validation"].labels, strict=True)
        for word, tag in zip(words, tags, strict=True)
    ]
    return float(np.mean(right))


def main() -> None:
    data = Path(sys.argv[1])
    for task, metric in (("sst2", task_metrics.accuracy), ("cola", task_metrics.matthews), ("rte", task_metrics.accuracy)):
        source = sources.load(glue.get_config(f"{task},n=1,data={data / task}").data)
        print(f"{task}: {100 * metric(np.asarray(source.splits['validation'].labels), bag_of_words(source)):.1f}")
    source = sources.load(tagging.get_config(f"ewt,n=1,data={data / 'ud_ewt'}").data)
    print(f"ewt: {100 * commonest_tag(source):.1f}")
    source = sources.load(glue.get_config(f"stsb,n=1,data={data / 'stsb'}").data)
    print(f"stsb: {100 * task_metrics.spearman(np.asarray(source.splits['validation'].labels), overlap(source)):.1f}")


if __name__ == "__main__":
    main()
