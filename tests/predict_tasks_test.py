"""Prediction beside single texts: pairs with numbers, and tags of words; from Python, from files, and exported."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import datamux_jax
from datamux_jax import export, output_files, stream
from datamux_jax.data.tables import Table
from datamux_jax.model import call
from datamux_jax.train import train
from tests.conftest import text_config

PAIRS = [(f"one {i}", "two" * (i % 9)) for i in range(40)]
SENTENCES = [[f"word{i}", "and", "x" * (i % 7 + 1)] for i in range(40)]
# Longer than a row: the first words fill it.
SENTENCES[3] = ["a", "b" * 100, "c"]


@pytest.fixture(scope="module")
def pair_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "test"):
        rows = "".join(f"{a}\t{b or '-'}\t{i / 10}\n" for i, (a, b) in enumerate(PAIRS))
        (folder / f"{split}.tsv").write_text("a\tb\tscore\n" + rows)
    files = {"data__train_file": str(folder / "train.tsv"), "data__test_file": str(folder / "test.tsv")}
    files["data__validation_file"] = files["data__test_file"]
    columns = {"data__text": "a", "data__text_pair": "b", "data__label": "score", "data__numbers": True}
    changes = {"objective": "regression", "data__source": "table", "data__length": 40, "steps": 2}
    train(text_config(**changes, **files, **columns), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def word_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    for split in ("train", "test"):
        text = "".join("".join(f"{word} {tag}\n" for word, tag in zip(words, "ABA", strict=True)) + "\n" for words in SENTENCES)
        (folder / f"{split}.txt").write_text(text)
    files = {"data__train_file": str(folder / "train.txt"), "data__test_file": str(folder / "test.txt")}
    changes = {"objective": "tagging", "data__source": "tagging", "data__format": "conll", "data__length": 40, "steps": 2}
    train(text_config(**changes, **files), folder / "run")
    return folder / "run"


def predict_file(predictor, path, fields):
    target = path.with_name(path.name + ".out.jsonl")
    output = output_files.OutputFile(target, fields.columns(predictor.objective), {})
    with output, Table(path, fields.kinds(predictor)) as rows:
        stream.predict_rows(predictor, rows, output, fields, show=False)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_number_of_every_pair(pair_run, tmp_path):
    predictor = datamux_jax.load(pair_run)
    numbers = predictor(PAIRS, ensemble=2)
    assert len(numbers) == 40
    assert all(isinstance(number, float) for number in numbers)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"a": a, "b": b or "-", "s": "x"}) + "\n" for a, b in PAIRS))
    rows = predict_file(predictor, tmp_path / "in.jsonl", stream.Fields(("a", "b"), label="s"))
    expected = predictor([(a, b or "-") for a, b in PAIRS])
    np.testing.assert_allclose([row["value"] for row in rows], expected, atol=1e-6)
    assert all("is no number" in row["error"] for row in rows)
    export.export_run(pair_run, tmp_path / "export", ("cpu",))
    np.testing.assert_allclose(datamux_jax.load_exported(tmp_path / "export")(PAIRS, ensemble=2), numbers, atol=1e-6)


def test_a_tag_of_every_word_that_the_row_holds(word_run, tmp_path):
    predictor = datamux_jax.load(word_run)
    tags = predictor(SENTENCES)
    assert [len(of_one) for of_one in tags] == [3] * 40
    assert tags[3][0] in "AB"
    assert tags[3][2] is None
    assert predictor.encode(SENTENCES).truncated.tolist() == [i == 3 for i in range(40)]
    assert all(tag in ("A", "B") for i, of_one in enumerate(tags) if i != 3 for tag in of_one)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"words": words, "tags": "A B"}) + "\n" for words in SENTENCES))
    rows = predict_file(predictor, tmp_path / "in.jsonl", stream.Fields(("words",), label="tags"))
    assert [row["tags"] for row in rows] == tags
    assert [row["truncated"] for row in rows] == [i == 3 for i in range(40)]
    assert rows[0]["error"] == "has 2 labels for 3 words"
    export.export_run(word_run, tmp_path / "export", ("cpu",))
    assert datamux_jax.load_exported(tmp_path / "export")(SENTENCES) == tags


def parquet(path, values, kind):
    pyarrow.parquet.write_table(pyarrow.table({"words": pyarrow.array(values, kind)}), path)


def test_words_come_as_lists_or_between_spaces(word_run, tmp_path):
    predictor = datamux_jax.load(word_run)
    tags = predictor(SENTENCES)
    spaced = [" ".join(words) for words in SENTENCES]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"words": words}) + "\n" for words in SENTENCES))
    (tmp_path / "in.tsv").write_text("n\twords\n" + "".join(f"{i}\t{text} \n" for i, text in enumerate(spaced)))
    parquet(tmp_path / "in.parquet", SENTENCES, pyarrow.list_(pyarrow.string()))
    parquet(tmp_path / "bytes.parquet", SENTENCES, pyarrow.list_(pyarrow.binary()))
    for name in ("in.jsonl", "in.tsv", "in.parquet", "bytes.parquet"):
        rows = predict_file(predictor, tmp_path / name, stream.Fields(("words",)))
        assert [row["row"] for row in rows] == list(range(1, 41))
        assert [row["tags"] for row in rows] == tags, name
        assert not any(row["error"] for row in rows)


BAD_WORDS = [
    ('{"words": ["good", "row"]}', None),
    ('{"words": []}', "has no word in the column 'words'"),
    ('{"words": ["a", 3]}', "has a word with no text, but a value of type int in the column 'words'"),
    ('{"words": ["a", " "]}', "has a word with no text in the column 'words'"),
    ('{"words": null}', "has no value in the column 'words'"),
    ('{"words": {"a": 1}}', "has no list of words, but a value of type dict in the column 'words'"),
    ('{"word": ["a"]}', "has no field 'words'"),
    ('{"words": "two words"}', None),
]


def test_bad_lists_of_words_are_reported_and_stop_nothing(word_run, tmp_path):
    predictor = datamux_jax.load(word_run)
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line, _ in BAD_WORDS))
    rows = predict_file(predictor, tmp_path / "in.jsonl", stream.Fields(("words",)))
    assert [row["error"] for row in rows] == [error for _, error in BAD_WORDS]
    assert [row["tags"] and len(row["tags"]) for row in rows] == [2, *[None] * 6, 2]
    parquet(tmp_path / "in.parquet", [[b"a", b"\xff"], [b"a", None], [b"a"]], pyarrow.list_(pyarrow.binary()))
    rows = predict_file(predictor, tmp_path / "in.parquet", stream.Fields(("words",)))
    assert [row["error"] for row in rows] == [
        "is not UTF-8 at byte 1 (0xff)", "has a word with no value in the column 'words'", None
    ]  # fmt: skip


def test_long_words_end_a_window(word_run, monkeypatch):
    """Memory is bounded by what words are made of, not by their number alone."""
    predictor = datamux_jax.load(word_run)
    lines = json.dumps({"words": ["x" * 100]}).encode() + b"\n"
    fields = stream.Fields(("words",))
    monkeypatch.setattr(stream, "WINDOW_CHARACTERS", 1000)
    with Table(io.BytesIO(lines * 40), fields.kinds(predictor), file_format="jsonl") as rows:
        assert [len(block.rows) for block in stream.blocks(rows, predictor, fields, skip=0, digest="")] == [8] * 5


def test_tags_are_read_at_the_first_token_of_each_word(word_run):
    """One batch, padded: group by group, as the network computes it."""
    predictor = datamux_jax.load(word_run)
    sentences = SENTENCES[:32]
    arrays = predictor.format.encode(sentences)
    inputs, mask = (arrays[name].reshape(16, 2, 40) for name in ("inputs", "mask"))
    model, params = predictor.run.model, predictor.run.params
    states = np.asarray(call(model, params, "tag", call(model, params, "encode", inputs, mask))).reshape(32, 40, -1)
    for logits, state, words, word in zip(
        predictor.logits(sentences, buckets=False), states, sentences, arrays["word"], strict=True
    ):
        for number in range(len(words)):
            at = np.flatnonzero(word == number)
            if len(at):
                np.testing.assert_allclose(logits[number], state[at[0]], atol=2e-6)
            else:
                assert np.isnan(logits[number]).all()
