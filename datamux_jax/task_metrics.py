"""Metrics of a whole set of predictions, which sums cannot give. Table `METRICS`: name -> `Metric`.

GLUE (https://gluebenchmark.com/tasks): accuracy; F1 of class 1 (MRPC, QQP); Matthews (CoLA); Pearson and Spearman (STS-B). Named
entities: chunks as the script of the CoNLL shared tasks cuts them (https://www.clips.uantwerpen.be/conll2000/chunking/output.html).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamux_jax.errors import InputError, choose
from datamux_jax.losses import NO_LABEL

COMBINED = "combined"
# Instead of a tag, at words that lie beyond the length that the network reads.
NO_PREDICTION = -1


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
      compute: function of labels and predictions, both `[n]` (tagging: `[n, W]`, one a word, labels padded with -100), and of the
        names of the labels; returns `numbers`.
      objectives: whose predictions it measures.
      numbers: names of what it returns; the metric's own is among them.
    """

    compute: Callable[[np.ndarray, np.ndarray, Sequence[str]], tuple[float, ...]]
    objectives: tuple[str, ...]
    numbers: tuple[str, ...]


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of the labels that are predicted."""
    there = labels != NO_LABEL
    return float((labels == predictions)[there].mean())


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1, of two; 0 if it neither occurs nor is predicted."""
    from sklearn.metrics import f1_score  # Heavy import, needed here alone.

    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews' correlation of two or more classes; 0 if all labels or all predictions are the same."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    from sklearn.metrics import matthews_corrcoef  # Heavy import, needed here alone.

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Linear correlation; 0 where it is not defined, because all labels or all predictions are the same."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    from scipy.stats import pearsonr  # Heavy import, needed here alone.

    return float(pearsonr(labels.astype(np.float64), predictions.astype(np.float64)).statistic)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of the ranks; 0 where it is not defined, because all labels or all predictions are the same."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    from scipy.stats import spearmanr  # Heavy import, needed here alone.

    return float(spearmanr(labels, predictions).statistic)


def entity_scores(labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of chunks, over all types together, as conlleval counts them; 0 where nothing is found or there.

    A chunk is right if one of the same type has the same first and last word. Words without a prediction are taken for O.

    Args:
      labels: `[n, W]`, padded with -100.
      predictions: `[n, W]`.
      label_names: `O`, and types behind B-, I-, E- or S-.

    Raises:
      InputError: another name.
    """
    kinds, types = _tags(label_names)
    outside = np.full((len(labels), 1), NO_LABEL)

    def chunks(tags: np.ndarray) -> np.ndarray:
        # Sentences one after another, an O behind each.
        flat = np.concatenate([np.where(labels == NO_LABEL, NO_LABEL, tags), outside], axis=1).ravel()
        known, tag = flat >= 0, np.maximum(flat, 0)
        return _chunks(np.where(known, kinds[tag], "O"), np.where(known, types[tag], -1))

    gold, found = chunks(labels), chunks(predictions)
    right = len(np.intersect1d(gold, found))
    return right / max(len(found), 1), right / max(len(gold), 1), 2 * right / max(len(found) + len(gold), 1)


def _chunks(kind: np.ndarray, type_: np.ndarray) -> np.ndarray:
    """First word, last word and type of every chunk, as records.

    B and S always start one, and E and S always end one (the script knows no S, a chunk of one word). I and E start one too where
    none of their type goes on: after O, E or S, or after another type.
    """
    before, type_before = np.roll(kind, 1), np.roll(type_, 1)  # The last word is an O.
    inside = kind != "O"
    start = inside & (np.isin(kind, ["B", "S"]) | np.isin(before, ["O", "E", "S"]) | (type_ != type_before))
    goes_on = inside & ~start
    first, last = np.flatnonzero(start), np.flatnonzero(inside & ~np.roll(goes_on, -1))
    return np.rec.fromarrays([first, last, type_[first]])


def _tags(label_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Letter and type number of every label."""
    split = [re.fullmatch(r"O|([BIES])(?:-(.*))?", name, re.DOTALL) for name in label_names]
    if not all(split):
        wrong = ", ".join(repr(name) for name, match in zip(label_names, split, strict=True) if not match)
        raise InputError(
            f"The metric entity_f1 reads the tags O, B-TYPE, I-TYPE, E-TYPE and S-TYPE, but the labels have {wrong}. Measure the "
            "accuracy of such tags instead."
        )
    letters = [match[1] or "O" for match in split if match]
    names = [match[2] or "" for match in split if match]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array(letters), np.array([numbers[name] for name in names])


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _simple(function: Callable[[np.ndarray, np.ndarray], float], *objectives: str) -> Metric:
    return Metric(lambda labels, predictions, names: (function(labels, predictions),), objectives, (function.__name__,))


METRICS: dict[str, Metric] = {
    "accuracy": _simple(accuracy, "classification", "tagging"),
    "f1": _simple(f1, "classification"),
    "matthews": _simple(matthews, "classification"),
    "pearson": _simple(pearson, "regression"),
    "spearman": _simple(spearman, "regression"),
    "entity_f1": Metric(entity_scores, ("tagging",), ("entity_precision", "entity_recall", "entity_f1")),
}


def check(metrics: Sequence[str], objective: str, label_names: Sequence[str]) -> None:
    """Checks that `metrics` can measure what a network trained for `objective` predicts.

    Raises:
      InputError: an unknown metric, or one of something else.
    """
    for name in metrics:
        metric = METRICS[choose(METRICS, name, "The metric")]
        if objective not in metric.objectives:
            fitting = ", ".join(other for other, one in METRICS.items() if objective in one.objectives)
            raise InputError(
                f"The metric {name!r} measures {' or '.join(metric.objectives)}, but objective = {objective!r}. Choose of: {fitting}."
            )
        if name == "f1" and len(label_names) != 2:
            raise InputError(
                f"The metric 'f1' is that of the second of two classes, as GLUE has it, but there are {len(label_names)}. Use "
                "'accuracy' or 'matthews'."
            )
        if name == "entity_f1":
            _tags(label_names)


def numbers_of(metrics: Sequence[str]) -> list[str]:
    """Names of what `measure` returns."""
    return [number for name in metrics for number in METRICS[name].numbers] + [COMBINED] * _combines(metrics)


def _combines(metrics: Sequence[str]) -> bool:
    """Whether the mean of `metrics` is reported: that of several in GLUE, which has no entities."""
    return len(metrics) > 1 and "entity_f1" not in metrics


def measure(
    metrics: Sequence[str], labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]
) -> dict[str, float | None]:
    """The numbers of all `metrics`, and `combined`, the mean of those of a task of GLUE with several. None where there are no labels.

    Args:
      metrics: keys of `METRICS`.
      labels: classes or numbers `[n]`; tags `[n, W]`, padded with -100.
      predictions: of the same shape; at words without one `NO_PREDICTION`.
      label_names: in the order of the classes.
    """
    if not (labels != NO_LABEL).any():
        return dict.fromkeys(numbers_of(metrics))
    numbers: dict[str, Any] = {}
    for name in metrics:
        metric = METRICS[name]
        numbers |= zip(metric.numbers, metric.compute(labels, predictions, label_names), strict=True)
    if _combines(metrics):
        numbers[COMBINED] = float(np.mean([numbers[name] for name in metrics]))
    return numbers
