"""Prediction from Python and from the command line."""

import io

import numpy as np
import pytest

import datamux_jax
from datamux_jax.data import builtin
from datamux_jax.errors import InputError
from datamux_jax.evaluate import evaluate
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


def test_files_are_read_line_by_line(tmp_path, monkeypatch):
    from launch import predict

    file = tmp_path / "in.txt"
    file.write_bytes(b"\xef\xbb\xbfguten Morgen\r\n\nna\xc3\xafve\n")
    assert predict.read_inputs(str(file)) == ["guten Morgen", "", "naïve"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb")))
    assert predict.read_inputs("-") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("in.txt", None, r"cannot be read.*Check the path"),
        ("in.txt", b"fine\nnot \xff fine\n", r"not UTF-8 in line 2, byte 5"),
        ("in.npy", b"not an array", r"cannot be read"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, data, message):
    from launch import predict

    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        predict.read_inputs(str(tmp_path / name))
