"""Labelled data sets of TensorFlow Datasets: the library's own builders, with a few examples in place of what they download."""

import importlib.resources.abc

import pytest

from datamux_jax.data import sources
from datamux_jax.errors import InputError
from tests.conftest import small_config

GLUE = {
    "sst2": {
        "train": [{"sentence": "naïve", "label": "positive", "idx": 0}, {"sentence": "bad", "label": "negative", "idx": 1}],
        "validation": [{"sentence": "so so", "label": "negative", "idx": 0}],
        "test": [{"sentence": "unknown", "label": -1, "idx": 0}],
    },
    "stsb": {
        "train": [{"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 0}],
        "validation": [{"sentence1": "c", "sentence2": "d", "label": 5.0, "idx": 0}],
    },
    "mnli": {
        "train": [{"premise": "a", "hypothesis": "b", "label": "neutral", "idx": 0}],
        "validation_matched": [{"premise": "c", "hypothesis": "d", "label": "contradiction", "idx": 0}],
        "validation_mismatched": [{"premise": "e", "hypothesis": "f", "label": "entailment", "idx": 0}],
    },
}
NER = {"tokens": ["EU", "rejects"], "pos": ["NNP", "VBZ"], "chunks": ["B-NP", "B-VP"], "ner": ["B-ORG", "O"]}
EMPTY = dict.fromkeys(("lemmas", "xpos", "feats", "head", "deprel", "deps", "misc"), ["_"] * 3)
UPOS = {"idx": "1", "text": "It's", "tokens": ["It's", "It", "'s"], "upos": ["_", "PRON", "AUX"], **EMPTY}


def prepare(monkeypatch, folder, name, splits):
    """Prepares the data set `name` as array_record, with these records."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text

    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    records = {split: list(enumerate(rows)) for split, rows in splits.items()}
    # The library looks for checksums with a package that it does not require; Python has the same.
    monkeypatch.setattr("tensorflow_datasets.core.dataset_builder.importlib_resources", importlib.resources)
    monkeypatch.setattr(type(builder), "_split_generators", lambda self, *_: {s: self._rows(s) for s in records})
    monkeypatch.setattr(type(builder), "_rows", lambda self, split: iter(records[split]), raising=False)
    builder.download_and_prepare()


def load(source, folder, **changes):
    config = small_config(**{"data__source": source, "data__path": str(folder)} | {f"data__{k}": v for k, v in changes.items()})
    return sources.load(config.data)


def sorted_rows(source):
    """Texts and labels of each split; the library shuffles the records."""
    return {split: sorted(zip(e.inputs, e.labels.tolist(), strict=True)) for split, e in source.splits.items()}


def test_tasks_of_glue_are_those_of_the_files(monkeypatch, tmp_path):
    for task, splits in GLUE.items():
        prepare(monkeypatch, tmp_path, f"glue/{task}", splits)
    source = load("glue", tmp_path, name="sst2")
    assert source.label_names == ("negative", "positive")
    assert sorted_rows(source) == {"train": [("bad", 0), ("naïve", 1)], "validation": [("so so", 0)]}
    numbers = load("glue", tmp_path, name="stsb")
    assert sorted_rows(numbers) == {"train": [(("a", "b"), 2.5)], "validation": [(("c", "d"), 5.0)]}
    assert numbers.split("train").labels.dtype == "float32"
    assert sorted_rows(load("glue", tmp_path, name="mnli")) == {
        "train": [(("a", "b"), 1)],
        "validation_matched": [(("c", "d"), 2)],
        "validation_mismatched": [(("e", "f"), 0)],
    }


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "stsb"])
def test_names_and_order_of_labels_are_those_of_the_library(tmp_path, task):
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text

    from datamux_jax.data.glue import TASKS

    features = tfds.builder(f"glue/{task}", data_dir=tmp_path).info.features
    assert set(TASKS[task].texts) == set(features) - {"label", "idx"}
    assert TASKS[task].names == (tuple(features["label"].names) if task != "stsb" else ())


def test_entities_and_parts_of_speech(monkeypatch, tmp_path):
    prepare(monkeypatch, tmp_path, "conll2003", {"train": [NER], "dev": [NER], "test": [NER]})
    source = load("tagging", tmp_path, name="conll2003")
    assert (source.label_names, source.metrics) == (("B-ORG", "O"), ("entity_f1", "accuracy"))
    assert set(source.splits) == {"train", "validation", "test"}
    assert source.split("validation").inputs == [["EU", "rejects"]]
    assert source.split("train").labels[0].tolist() == [0, 1]
    prepare(monkeypatch, tmp_path, "universal_dependencies/en_ewt", {"train": [UPOS], "dev": [UPOS], "test": [UPOS]})
    source = load("tagging", tmp_path, name="ewt")
    assert (source.label_names, source.metrics) == (("AUX", "PRON"), ("accuracy",))
    assert source.split("test").inputs == [["It", "'s"]]  # Without the range "It's".
    assert source.split("test").labels[0].tolist() == [1, 0]


def test_what_is_not_prepared_is_refused(monkeypatch, tmp_path):
    prepare(monkeypatch, tmp_path, "glue/sst2", GLUE["sst2"])
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    assert len(load("glue", "", name="sst2").split("train")) == 2
    with pytest.raises(
        InputError, match=r"data.name = 'glue/rte': the prepared data in .* are not there.*download_and_prepare"
    ):
        load("glue", "", name="rte")
    (tmp_path / "glue" / "rte").mkdir()
    with pytest.raises(InputError, match=r"'glue/rte': the prepared data in .* are not there"):
        load("glue", tmp_path, name="rte")
    with pytest.raises(InputError, match=r"has no training file of this task"):
        load("glue", tmp_path, name="cola")
    with pytest.raises(InputError, match=r"data.label = 'pos' is set, but .* come from TensorFlow Datasets"):
        load("tagging", "", name="conll2003", label="pos")
