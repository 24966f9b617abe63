"""Metrics of whole sets of predictions, against numbers that are worked out by hand."""

import numpy as np
import pytest

from datamux_jax import task_metrics
from datamux_jax.errors import InputError
from datamux_jax.losses import NO_LABEL

NAMES = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC")


def tags(*sentences):
    """Rows of label numbers, padded."""
    rows = [[NAMES.index(tag) for tag in sentence.split()] for sentence in sentences]
    out = np.full((len(rows), max(map(len, rows))), NO_LABEL)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def chunks(sentence):
    """First word, last word and type of each chunk of one sentence."""
    kinds, types = task_metrics._tags(NAMES)
    row = np.append(tags(sentence)[0], 0)
    return [(int(a), int(b), ("", "LOC", "PER")[t]) for a, b, t in task_metrics._chunks(kinds[row], types[row])]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("B-PER I-PER O B-LOC", [(0, 1, "PER"), (3, 3, "LOC")]),
        ("B-PER B-PER I-PER", [(0, 0, "PER"), (1, 2, "PER")]),
        ("I-PER I-PER O I-LOC", [(0, 1, "PER"), (3, 3, "LOC")]),  # IOB1, or ill-formed IOB2: I after O starts a chunk.
        ("B-PER I-LOC I-LOC", [(0, 0, "PER"), (1, 2, "LOC")]),  # I after another type starts one.
        ("I-PER B-PER", [(0, 0, "PER"), (1, 1, "PER")]),
        ("B-PER I-PER E-PER S-PER", [(0, 2, "PER"), (3, 3, "PER")]),
        ("S-PER I-PER", [(0, 0, "PER"), (1, 1, "PER")]),  # S always ends one,
        ("B-PER E-PER I-PER E-PER", [(0, 1, "PER"), (2, 3, "PER")]),  # and so does E.
        ("E-PER E-PER", [(0, 0, "PER"), (1, 1, "PER")]),
        ("B-PER E-LOC O S-LOC S-LOC", [(0, 0, "PER"), (1, 1, "LOC"), (3, 3, "LOC"), (4, 4, "LOC")]),
        ("B-PER E-PER B-PER", [(0, 1, "PER"), (2, 2, "PER")]),
        ("O O", []),
    ],
)
def test_chunks_are_cut_as_conlleval_cuts_them(sentence, expected):
    assert chunks(sentence) == expected


def entities(gold, found):
    return task_metrics.entity_scores(tags(*gold), tags(*found), NAMES)


def test_entity_f1_of_a_small_set():
    gold = ["B-PER I-PER O B-LOC", "O B-LOC I-LOC", "B-PER"]  # 4 chunks.
    # 4 chunks: the first is too short, the second and the third are right, the last is of another type.
    found = ["B-PER O O B-LOC", "O I-LOC I-LOC", "B-LOC"]
    assert entities(gold, found) == pytest.approx((2 / 4, 2 / 4, 1 / 2))
    assert entities(gold, ["B-PER I-PER O S-LOC", "B-PER I-LOC I-LOC", "O"]) == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert entities(gold, ["B-PER I-PER B-PER B-LOC", "B-LOC B-LOC I-LOC", "I-PER"]) == pytest.approx((4 / 6, 1.0, 0.8))


def test_entities_do_not_reach_into_the_next_sentence():
    assert entities(["O B-PER", "I-PER O"], ["O B-PER", "I-PER O"]) == (1.0, 1.0, 1.0)
    # Two chunks of one word each; as one of two words it would be right nowhere.
    assert entities(["O B-PER", "I-PER O"], ["O B-PER", "O O"]) == pytest.approx((1.0, 0.5, 2 / 3))


def test_entities_of_nothing_are_zero():
    assert entities(["O O"], ["O O"]) == (0.0, 0.0, 0.0)
    assert entities(["B-PER O"], ["O O"]) == (0.0, 0.0, 0.0)
    assert entities(["O O"], ["B-PER O"]) == (0.0, 0.0, 0.0)


def test_words_without_a_prediction_miss_their_entity_and_are_wrong():
    gold = tags("B-PER I-PER O B-LOC O", "B-LOC")
    found = gold.copy()
    found[0, 3:] = task_metrics.NO_PREDICTION
    # 2 of 3 chunks are found, and 4 of 6 words are right.
    assert task_metrics.entity_scores(gold, found, NAMES) == pytest.approx((1.0, 2 / 3, 0.8))
    assert task_metrics.accuracy(gold, found) == pytest.approx(4 / 6)
    found[0, 1] = task_metrics.NO_PREDICTION
    assert task_metrics.entity_scores(gold, found, NAMES) == pytest.approx((1 / 2, 1 / 3, 2 / 5))


def test_classes():
    labels, found = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    # 2 true positives, 1 false positive, 1 false negative, 4 true negatives.
    assert task_metrics.accuracy(labels, found) == pytest.approx(6 / 8)
    assert task_metrics.f1(labels, found) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert task_metrics.matthews(labels, found) == pytest.approx((2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5))
    # F1 is that of class 1, not of class 0.
    assert task_metrics.f1(1 - labels, 1 - found) == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))


def test_numbers():
    labels, found = np.array([1, 2, 3, 4], np.float32), np.array([1, 3, 2, 9], np.float32)
    # Deviations -1.5 -0.5 0.5 1.5 and -2.75 -0.75 -1.75 5.25: their products add up to 11.5, their squares to 5 and to 38.75.
    assert task_metrics.pearson(labels, found) == pytest.approx(11.5 / np.sqrt(5 * 38.75))
    assert task_metrics.spearman(labels, found) == pytest.approx(1 - 6 * 2 / (4 * 15))  # Ranks 1 3 2 4: two are off by one.


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_constant_has_a_defined_result(name, both):
    labels = np.zeros(4, np.float32) + (0 if both else np.arange(4) % 2)
    if name in ("f1", "matthews"):
        labels = labels.astype(np.int32)
    assert getattr(task_metrics, name)(labels, np.zeros_like(labels)) == 0.0
    if name in ("pearson", "spearman"):  # A number whose mean is rounded.
        assert getattr(task_metrics, name)(labels, np.full_like(labels, 0.1)) == 0.0


def test_several_metrics_are_combined_as_in_glue():
    labels, found = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    names = ("no", "yes")
    assert task_metrics.measure(("accuracy",), labels, found, names) == {"accuracy": 0.75}
    both = task_metrics.measure(("accuracy", "f1"), labels, found, names)
    assert both == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "combined": (0.75 + 2 / 3) / 2})
    assert list(both) == task_metrics.numbers_of(("accuracy", "f1"))
    tagged = task_metrics.measure(("entity_f1", "accuracy"), tags("B-PER O"), tags("B-PER S-LOC"), NAMES)
    assert tagged == pytest.approx({"entity_precision": 0.5, "entity_recall": 1.0, "entity_f1": 2 / 3, "accuracy": 0.5})
    nothing = task_metrics.measure(("accuracy", "f1"), labels[:0], found[:0], names)
    assert nothing == {"accuracy": None, "f1": None, "combined": None}


@pytest.mark.parametrize(
    ("metrics", "objective", "names", "message"),
    [
        (("bleu",), "classification", ("a", "b"), "'bleu' does not exist. Choose one of: accuracy, entity_f1"),
        (("pearson",), "classification", ("a", "b"), "'pearson' measures regression, but.*Choose of: accuracy"),
        (("accuracy",), "regression", (), "Choose of: pearson, spearman"),
        (("f1",), "classification", ("a", "b", "c"), "but there are 3"),
        (("entity_f1",), "tagging", ("O", "NOUN", "B-PER", "U-PER"), "but the labels have 'NOUN', 'U-PER'"),
    ],
)  # fmt: skip
def test_metrics_that_cannot_measure_are_refused(metrics, objective, names, message):
    with pytest.raises(InputError, match=message):
        task_metrics.check(metrics, objective, names)


def test_metrics_that_fit_are_taken():
    task_metrics.check(("accuracy", "f1"), "classification", ("a", "b"))
    task_metrics.check(("entity_f1",), "tagging", NAMES)
    task_metrics.check(("entity_f1",), "tagging", ("B", "I", "O"))
