"""The whole path of data of one's own: files, training, scores, predictions of a file, export."""

import csv
import json

import numpy as np
import pytest

import datamux_jax
from configs import tagging, text_files
from datamux_jax import experiment, export, output_files, stream
from datamux_jax.data.tables import Table
from datamux_jax.evaluate import evaluate_run
from datamux_jax.train import train

SMALL = "size=1x64,steps=12,warmup=0,groups=4,rate=1e-2,length=16"
NAMES = ("Ann", "Bob", "Eve")


def trained(config, folder):
    """The folder of the only run of a config."""
    ((name, run),) = experiment.expand(config).items()
    train(run, folder / "runs" / name)
    return folder / "runs" / name


def predicted(inference, source, fields):
    """The rows that a file of predictions has."""
    target = source.with_name(f"{source.name}-{type(inference).__name__}.jsonl")
    output = output_files.OutputFile(target, fields.columns(inference.objective), {})
    with output, Table(source, fields.kinds(inference)) as rows:
        tally = stream.predict_rows(inference, rows, output, fields, show=False)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert (tally.rows, tally.errors) == (len(lines), 0)
    return lines


def test_texts_of_a_table(tmp_path):
    """With one instance nobody is mixed with anybody, so scoring and prediction give every row the same."""
    rows = [(f"k{i}", f"{('good', 'bad', 'so so')[i % 3]} film {i}", "no" if i % 3 == 1 else "yes") for i in range(30)]
    for name, some in (("train", rows), ("dev", rows[:20])):
        (tmp_path / f"{name}.tsv").write_text("key\ttext\tliked\n" + "".join("\t".join(row) + "\n" for row in some))
    arg = f"train={tmp_path}/train.tsv,dev={tmp_path}/dev.tsv,text=text,label=liked,n=1,{SMALL}"
    run = trained(text_files.get_config(arg), tmp_path)

    scores = evaluate_run(run, groupings=1, predictions=tmp_path / "scored.tsv")
    with (tmp_path / "scored.tsv").open(newline="") as handle:
        scored = list(csv.DictReader(handle, delimiter="\t"))
    assert [row["label"] for row in scored] == [label for _, _, label in rows[:20]]
    assert {row["prediction"] for row in scored} == {"no", "yes"}
    assert scores["accuracy"] == pytest.approx(np.mean([row["label"] == row["prediction"] for row in scored]))

    fields = stream.Fields(("text",), "key", "liked")
    found = predicted(datamux_jax.load(run), tmp_path / "dev.tsv", fields)
    assert [(row["id"], row["row"]) for row in found] == [(key, i) for i, (key, _, _) in enumerate(rows[:20], start=1)]
    assert [(str(row["row"]), row["label"]) for row in found] == [(row["row"], row["prediction"]) for row in scored]
    np.testing.assert_allclose([row["probability"] for row in found], [float(row["score"]) for row in scored], atol=1e-5)

    export.export_run(run, tmp_path / "export", ("cpu",))
    again = predicted(datamux_jax.load_exported(tmp_path / "export"), tmp_path / "dev.tsv", fields)
    assert [row["label"] for row in again] == [row["label"] for row in found]


def entities(tags):
    """Start, end and type of the entities of a sentence in IOB2."""
    found = []
    for at, tag in enumerate([*tags, "O"]):
        if found and found[-1][1] is None and not tag.startswith("I"):
            found[-1][1] = at
        if tag.startswith("B") or (tag.startswith("I") and (not found or found[-1][1] is not None)):
            found.append([at, None, tag[2:]])
    return {tuple(one) for one in found}


def test_words_of_columns(tmp_path):
    """Two sentences at once, from BIOES to entities that are scored, and to the tags of every word."""
    sentences = [
        ([NAMES[i % 3], *[NAMES[(i + 1) % 3]] * (i % 2), "saw", "it"], ["B-P", "E-P", "O", "O"] if i % 2 else ["S-P", "O", "O"])
        for i in range(24)
    ]
    text = "\n\n".join("\n".join(f"{word} _ {tag}" for word, tag in zip(*one, strict=True)) for one in sentences)
    (tmp_path / "train.conll").write_text(text + "\n")
    (tmp_path / "dev.conll").write_text("# id 17 domain=en\n" + text + "\n")
    arg = f"train={tmp_path}/train.conll,dev={tmp_path}/dev.conll,n=2,{SMALL}"
    run = trained(tagging.get_config(arg), tmp_path)

    scores = evaluate_run(run, groupings=1, predictions=tmp_path / "scored.jsonl")
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    iob2 = [[{"S-P": "B-P", "E-P": "I-P"}.get(tag, tag) for tag in tags] for _, tags in sentences]
    assert [row["label"] for row in scored] == iob2
    gold, guesses = ([entities(row[key]) for row in scored] for key in ("label", "prediction"))
    right = sum(len(a & b) for a, b in zip(gold, guesses, strict=True))
    assert right > 0
    assert scores["entity_f1"] == pytest.approx(2 * right / (sum(map(len, gold)) + sum(map(len, guesses))))
    pairs = [pair for row in scored for pair in zip(row["label"], row["prediction"], strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))

    source = tmp_path / "words.jsonl"
    source.write_text(
        "".join(json.dumps({"words": words, "tags": tags}) + "\n" for (words, _), tags in zip(sentences, iob2, strict=True))
    )
    fields = stream.Fields(("words",), label="tags")
    found = predicted(datamux_jax.load(run), source, fields)
    assert [len(row["tags"]) for row in found] == [len(words) for words, _ in sentences]
    export.export_run(run, tmp_path / "export", ("cpu",))
    again = predicted(datamux_jax.load_exported(tmp_path / "export"), source, fields)
    assert [row["tags"] for row in again] == [row["tags"] for row in found]
