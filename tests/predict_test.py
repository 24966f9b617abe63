"""Prediction from Python and from the command line."""

import numpy as np
import pytest

import datamux_jax
from datamux_jax import inference
from datamux_jax.data import builtin
from datamux_jax.errors import InputError
from datamux_jax.evaluate import evaluate
from datamux_jax.model import call
from datamux_jax.runs import load_run
from datamux_jax.train import train
from tests.conftest import small_config, text_config

PHRASES = ["guten Morgen", "bonjour", "", "buongiorno a tutti"]


def test_labels_with_probabilities_in_input_order(text_run):
    predictor = datamux_jax.load(text_run)
    predictions = predictor(PHRASES)
    assert len(predictions) == 4
    for p in predictions:
        assert p.label in builtin.CLDR_LANGUAGES
        assert sum(p.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert p.probability == max(p.probabilities.values()) == p.probabilities[p.label]


def test_any_number_of_inputs(text_run):
    predictor = datamux_jax.load(text_run)
    many = [f"phrase number {i}" for i in range(predictor.batch_size + 3)]
    rows = predictor.probabilities(many)
    assert rows.shape == (len(many), 30)
    # Input i sits in slot i % N of group i // N, so whole batches are predicted alike alone and in front of others.
    np.testing.assert_allclose(rows[: predictor.batch_size], predictor.probabilities(many[: predictor.batch_size]), atol=1e-6)
    assert predictor([]) == []


def test_a_filler_is_dropped_and_its_slot_kept(digits_run):
    predictor = datamux_jax.load(digits_run)
    images = builtin.digits().split("test").inputs[:3]
    assert predictor.probabilities(images).shape == (3, 10)


def test_prediction_equals_evaluation(tmp_path):
    """The plain network does not depend on who comes along, so both paths must agree exactly."""
    train(small_config(1, steps=30, optimizer__learning_rate=3e-3), tmp_path / "run")
    test = builtin.digits().split("test")
    labels = [int(p.label) for p in datamux_jax.load(tmp_path / "run")(test.inputs)]
    scored = evaluate(load_run(tmp_path / "run"), split="test", groupings=1)
    assert np.mean(np.array(labels) == test.labels) == pytest.approx(scored["accuracy"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("guten Morgen", "Pass a list"),
        ([b"bytes"], "of type bytes"),
        (np.zeros((2, 8, 8)), "reads a list of strings"),
        (np.zeros(()), "reads a list of strings"),
        (None, "reads a list of strings"),
    ],
)
def test_wrong_inputs_are_refused(text_run, inputs, message):
    with pytest.raises(InputError, match=message):
        datamux_jax.load(text_run)(inputs)


def test_a_warm_up_has_no_classifier_to_use(tmp_path):
    train(text_config(objective="retrieval", steps=1, optimizer__warmup_steps=0), tmp_path / "run")
    with pytest.raises(InputError, match="its classifier was never trained"):
        datamux_jax.load(tmp_path / "run")


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="it does not exist"):
        datamux_jax.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no config.json"):
        datamux_jax.load(tmp_path)


@pytest.fixture(scope="module")
def long_text_runs(tmp_path_factory):
    """Runs on texts of up to 40 bytes, so that there are three lengths of rows, with N = 1 and 2."""
    folder = tmp_path_factory.mktemp("long")
    for n in (1, 2):
        train(text_config(n, data__length=40, steps=2, checkpoint__every=2), folder / f"n{n}")
    return folder


TEXTS = ["x" * (1 + 7 * i % 50) for i in range(45)]


def test_buckets_change_nothing_in_the_plain_network(long_text_runs):
    predictor = datamux_jax.load(long_text_runs / "n1")
    assert predictor.lengths == (16, 32, 40)
    cut, full = predictor.logits(TEXTS), predictor.logits(TEXTS, buckets=False)
    np.testing.assert_allclose(cut, full, atol=2e-6)
    assert [p.label for p in predictor(TEXTS)] == [p.label for p in predictor(TEXTS, buckets=False)]


@pytest.mark.slow
def test_rows_of_a_mixed_network_are_those_of_its_buckets(long_text_runs):
    """Companions are the next of the same bucket, the longest bucket first, and a row ends where the bucket does."""
    predictor = datamux_jax.load(long_text_runs / "n2")
    sizes = np.array([min(len(text) + 1, 40) for text in TEXTS])
    bucket = np.select([sizes <= 16, sizes <= 32], [16, 32], 40)
    order = [i for length in (40, 32, 16) for i in range(len(TEXTS)) if bucket[i] == length]
    arrays = predictor.format.encode(TEXTS)
    expected = np.zeros((len(TEXTS), 30), np.float32)
    assert predictor.batch_size == 32
    for start, count in ((0, 32), (32, 12)):
        rows = np.array(order[start : start + count]).reshape(-1, 2)
        length = bucket[rows[0, 0]]
        logits = explicit(predictor, *(arrays[name][rows, :length] for name in ("inputs", "mask")))
        expected[rows] = logits
    last = order[44]  # The tail: a copy of what sits in the same slot of the first group fills the second slot.
    rows = np.array([[last, order[33]]])
    expected[last] = explicit(predictor, *(arrays[name][rows, : bucket[order[32]]] for name in ("inputs", "mask")))[0, 0]
    np.testing.assert_allclose(predictor.logits(TEXTS), expected, atol=2e-6)


def explicit(predictor, inputs, mask):
    model, params = predictor.run.model, predictor.run.params
    return call(model, params, "classify", call(model, params, "encode", inputs, mask), mask)


def test_an_ensemble_is_the_mean_over_explicit_groupings(digits_run):
    predictor = datamux_jax.load(digits_run)
    images = np.asarray(builtin.digits().split("test").inputs[:32])
    assert predictor.batch_size == 32
    first = np.arange(32).reshape(16, 2)
    # Slot 0 of group b moves to slot 1 of b; slot 1 of group b to slot 0 of b + 1.
    second = np.stack([np.roll(first[:, 1], 1), first[:, 0]], axis=1)
    expected = np.zeros((32, 10), np.float32)
    for rows in (first, second):
        expected[rows] += np.asarray(explicit(predictor, images[rows], np.ones((16, 2, 8), np.int32))) / 2
    np.testing.assert_allclose(predictor.logits(images, ensemble=2), expected, atol=2e-6)
    assert np.abs(predictor.logits(images) - expected).max() > 1e-4
    with pytest.raises(InputError, match=r"ensemble = 3 .* Choose one of: 1, 2"):
        predictor(images, ensemble=3)


def test_predictions_are_the_same_in_one_call_and_in_windows(text_run, monkeypatch):
    predictor = datamux_jax.load(text_run)
    many = [f"phrase number {i}"[i % 9 :] for i in range(150)]
    monkeypatch.setattr(inference, "WINDOW", 60)
    assert predictor.window == 64
    whole = predictor.logits(many)
    parts = [predictor.logits(many[start : start + 64]) for start in (0, 64, 128)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_what_is_longer_than_a_row_is_known_to_be(text_run):
    predictor = datamux_jax.load(text_run)
    window = predictor.encode(["x" * 11, "x" * 12, "x" * 100_000, ""])
    assert window.truncated.tolist() == [False, True, True, False]
    assert window.sizes.tolist() == [12, 12, 12, 1]
