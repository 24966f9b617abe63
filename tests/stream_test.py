"""Prediction of tables: what comes out for good and for damaged rows, and going on after an interruption."""

import copy
import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow.parquet
import pytest

import datamux_jax
from datamux_jax import inference, output_files, progress, stream
from datamux_jax.background import background
from datamux_jax.data.tables import Table
from datamux_jax.errors import InputError
from datamux_jax.tally import Tally, kind

TEXT = stream.Fields(("text",), "key", "language", echo=True)
GOOD = [f"phrase {i}" for i in range(70)]


@pytest.fixture(scope="module")
def predictor(text_run):
    return datamux_jax.load(text_run)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 32)


def write_rows(path, rows=None):
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows or [{"text": text, "key": i} for i, text in enumerate(GOOD)])
    )
    return path


def predict(predictor, source, target, fields=None, settings=None, **changes):
    fields = fields or stream.Fields(("text",), "key")
    columns = fields.columns(predictor.objective)
    with (
        output_files.OutputFile(target, columns, settings or {"seed": 1}) as output,
        Table(source, fields.kinds(predictor)) as rows,
    ):
        return None if output.finished else stream.predict_rows(predictor, rows, output, fields, show=False, **changes)


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_every_row_in_order_with_its_id_as_from_python(predictor, tmp_path, ending):
    counts = predict(predictor, write_rows(tmp_path / "in.jsonl"), tmp_path / f"out.{ending}")
    assert counts == Tally(rows=70, scored=70)
    rows = read(tmp_path / f"out.{ending}")
    assert [str(row["id"]) for row in rows] == [str(i) for i in range(70)]
    assert [str(row["row"]) for row in rows] == [str(i + 1) for i in range(70)]
    expected = predictor(GOOD)
    assert [row["label"] for row in rows] == [p.label for p in expected]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], [p.probability for p in expected], atol=1e-6)


DAMAGED = [
    (b'{"text": "guten Morgen", "key": "a", "language": "de"}', "de", ""),
    (b'{"text": "bonjour \xff", "key": "b", "language": "fr"}', None, "is not UTF-8"),
    (b'{"text": "no such language", "key": "c", "language": "xx"}', "scored", "the label 'xx', which the model does not know"),
    (b'{"key": "d", "language": "de"}', None, "has no field 'text'"),
    (b'{"text": "  ", "key": "e", "language": "de"}', None, "has no text"),
    (b'{"text": 7, "key": "f", "language": "de"}', None, "type int"),
    (b'{"text": "no key", "language": "de"}', "scored", "has no field 'key'"),
    (b"{", None, "is no JSON"),
    (b'{"text": "' + 10_000 * b"long " + b'", "key": "i", "language": "en"}', "truncated", ""),
    (b'{"text": "no language", "key": "j", "language": null}', "scored", "no value in the column 'language'"),
    (b'{"text": "bonjour \xff", "key": "k"}', None, "is not UTF-8"),
]


def test_damaged_rows_are_reported_and_stop_nothing(predictor, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line for line, _, _ in DAMAGED) + b"\n")
    counts = predict(predictor, tmp_path / "in.jsonl", tmp_path / "out.jsonl", TEXT)
    rows = read(tmp_path / "out.jsonl")
    assert (counts.rows, counts.scored, counts.truncated, counts.errors, counts.spared) == (11, 5, 3, 9, 3)
    assert "9 damaged (of which 3 predicted, as only id or label is wrong), see the column 'error' (" in str(counts)
    assert counts.reasons["is no JSON"] == counts.reasons["has a label which the model does not know"] == 1
    assert sum(counts.reasons.values()) == 9
    saved = json.loads((tmp_path / "out.jsonl.state.json").read_text())["counts"]
    assert saved == {"rows": 11, "scored": 5, "truncated": 3, "errors": 9, "reasons": counts.reasons}
    for number, (row, (_, outcome, error)) in enumerate(zip(rows, DAMAGED, strict=True), start=1):
        assert row["row"] == number
        assert (row["error"] is None) if not error else error in row["error"], row
        assert (row["label"] in predictor.labels) == (outcome is not None), row
        assert (row["truncated"] is None) == (outcome is None)
    assert rows[8]["truncated"] is True
    assert rows[0]["input_text"] == "guten Morgen"
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "e", "f", None, None, "i", "j", "k"]


def test_a_table_of_damaged_rows_alone(predictor, tmp_path):
    counts = predict(predictor, write_rows(tmp_path / "in.jsonl", [{"text": "", "key": 1}] * 70), tmp_path / "out.tsv")
    assert counts == Tally(rows=70, errors=70, reasons={"has no text in the column 'text'": 70})
    assert len(read(tmp_path / "out.tsv")) == 70
    assert str(counts) == (
        "70 rows read, 0 predicted, 0 of them cut to what the model reads; 70 damaged, see the column 'error' "
        "(70: has no text in the column 'text')."
    )


@pytest.mark.parametrize(
    ("problem", "common"),
    [
        ("is not UTF-8 at byte 7 (0xff)", "is not UTF-8"),
        ("is no JSON: Expecting value: line 1 column 2 (char 1)", "is no JSON"),
        ("is no JSON object, but of type list", "is no JSON object, but of type list"),
        ("is no CSV: unexpected end of data (lines 3 to 9)", "is no CSV"),
        ("is a line of more than 4,194,304 bytes (lines 3 to 9)", "is a line of more than 4,194,304 bytes"),
        ("has 3 fields, but the header names 2", "has more or fewer fields than the header"),
        ("has no field '4'", "has no field '4'"),
        ("has the label 'a, which', which is no number", "has a label which is no number"),
        ("has 2 labels for 3 words", "has more or fewer labels than words"),
    ],
)
def test_reasons_have_few_kinds(problem, common):
    assert kind(problem) == common


def test_a_stream_whose_end_is_unknown_shows_rows_and_their_rate(predictor, monkeypatch, capsys):
    class Timed(progress.Progress):
        def __init__(self, label, total, start=0):
            super().__init__(label, total, start, seconds=0)

    monkeypatch.setattr(stream, "Progress", Timed)
    fields = stream.Fields(("text",))
    rows = Table(io.BytesIO("\n".join(GOOD).encode()), fields.kinds(predictor), file_format="text")
    stream.predict_rows(predictor, rows, output_files.Stream(io.BytesIO(), fields.columns("classification"), "tsv"), fields)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["Predicting", "(rows)", str(done)] for done in (32, 64, 70)]
    assert all(float(line.split()[3].removesuffix("/s").replace(",", "")) > 0 for line in lines)
    assert not any("left" in line for line in lines)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("ending", ["tsv", "parquet"])
@pytest.mark.parametrize("moment", ["before the state", "in a window", "before the name", "after the name"])
def test_going_on_gives_the_same_bytes(predictor, tmp_path, monkeypatch, ending, moment):
    source = write_rows(tmp_path / "in.jsonl", [{"text": text, "key": i} for i, text in enumerate(["", *GOOD[1:69], " "])])
    whole, killed = tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    predict(predictor, source, whole)
    save = output_files.OutputFile._save

    def failing(self, size, *, finished):
        late = {"before the state": self.tally.rows == 64, "in a window": self.tally.rows == 32}
        if (finished and moment == "after the name") or late.get(moment):
            if moment == "in a window":
                save(self, size, finished=finished)
                self._handle.write(b"half a row, of which nobody kno")
                self._handle.flush()
            raise KilledError
        save(self, size, finished=finished)

    with monkeypatch.context() as patch:
        patch.setattr(output_files.OutputFile, "_save", failing)
        if moment == "before the name":
            patch.setattr(output_files.OutputFile, "finish", lambda self: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            predict(predictor, source, killed)
    predict(predictor, source, killed)
    assert killed.read_bytes() == whole.read_bytes()
    counts = [json.loads(file.with_name(file.name + ".state.json").read_text())["counts"] for file in (killed, whole)]
    assert counts[0] == counts[1]
    assert not killed.with_name(killed.name + ".partial").exists()
    assert predict(predictor, source, killed) is None  # Not done again.


def interrupted(predictor, source, target, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(output_files.OutputFile, "finish", lambda self: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            predict(predictor, source, target)


def test_another_input_or_other_settings_are_refused(predictor, tmp_path, monkeypatch):
    source, target = write_rows(tmp_path / "in.jsonl"), tmp_path / "out.tsv"
    interrupted(predictor, source, target, monkeypatch)
    kept = (tmp_path / "out.tsv.partial").read_bytes()
    with pytest.raises(InputError, match="seed: 1 there, 2 now"):
        predict(predictor, source, target, settings={"seed": 2})
    write_rows(source, [{"text": text, "key": i if i else 5} for i, text in enumerate(GOOD)])
    with pytest.raises(InputError, match=r"The first 70 rows of .* are no longer those"):
        predict(predictor, source, target)
    write_rows(source, [{"text": text, "key": i} for i, text in enumerate(GOOD[:40])])
    with pytest.raises(InputError, match=r"The first 70 rows of .* are no longer those"):
        predict(predictor, source, target)
    assert (tmp_path / "out.tsv.partial").read_bytes() == kept
    (tmp_path / "out.tsv.partial").write_bytes(kept[:-1])
    with pytest.raises(InputError, match=r"bytes, but .* were written"):
        predict(predictor, write_rows(source), target)


def test_a_finished_output_is_that_of_its_rows_alone(predictor, tmp_path):
    source, target = write_rows(tmp_path / "in.jsonl"), tmp_path / "out.tsv"
    predict(predictor, source, target)
    state = tmp_path / "out.tsv.state.json"

    def check(rows, stamp):
        write_rows(source, rows)
        fields = stream.Fields(("text",), "key")
        output = output_files.OutputFile(target, fields.columns(predictor.objective), {"seed": 1}, stamp)
        with output, Table(source, fields.kinds(predictor)) as table:
            stream.check_finished(table, output)

    rows = [{"text": text, "key": i} for i, text in enumerate(GOOD)]
    for other, message in (
        ([*rows, {"text": "more", "key": 70}], "it has more than those 70 rows now"),
        (rows[:-1], "its first 70 rows are no longer those"),
        ([*rows[:-1], {"text": "other", "key": 69}], "its first 70 rows are no longer those"),
    ):
        before = state.read_bytes()
        with pytest.raises(InputError, match=message):
            check(other, {"bytes": 1})
        assert state.read_bytes() == before
    check(rows, {"bytes": 2})
    assert json.loads(state.read_text())["input"] == {"bytes": 2}


def test_a_finished_output_of_no_rows_is_known(predictor, tmp_path):
    fields = stream.Fields(("text",))
    for content, refused in (("", False), ("", False), ("a\n", True)):
        output = output_files.OutputFile(tmp_path / "out.tsv", fields.columns(predictor.objective), {})
        with output, Table(io.BytesIO(content.encode()), fields.kinds(predictor), file_format="text") as rows:
            if not output.finished:
                stream.predict_rows(predictor, rows, output, fields, show=False)
            elif refused:
                with pytest.raises(InputError, match="it has more than those 0 rows"):
                    stream.check_finished(rows, output)
            else:
                stream.check_finished(rows, output)


def test_two_processes_do_not_write_one_file(tmp_path):
    first = output_files.OutputFile(tmp_path / "out.tsv", {"row": "integer"}, {})
    with pytest.raises(InputError, match="Another process is writing"):
        output_files.OutputFile(tmp_path / "out.tsv", {"row": "integer"}, {})
    first.finish()
    assert (tmp_path / "out.tsv").read_text() == "row\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.txt", "'.txt', which is no format"), ("no/out.tsv", "folder does not exist"), ("in.tsv", "not overwritten")],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path, name, message):
    (tmp_path / "in.tsv").touch()
    with pytest.raises(InputError, match=message):
        output_files.check_output(tmp_path / name)


def test_a_stream_goes_out_row_by_row(predictor):
    fields = stream.Fields(("text",), echo=True)
    out = io.BytesIO()
    rows = Table(io.BytesIO(b"guten\tMorgen\nbonjour"), fields.kinds(predictor), file_format="text")
    sink = output_files.Stream(out, fields.columns("classification"), "tsv")
    assert stream.predict_rows(predictor, rows, sink, fields).rows == 2
    header, *lines = [line.split("\t") for line in out.getvalue().decode().splitlines()]
    assert header == ["row", "label", "probability", "truncated", "error", "input_text"]
    assert [line[5] for line in lines] == ["guten Morgen", "bonjour"]


def test_no_rows_have_a_header(predictor, tmp_path):
    fields, out = stream.Fields(("text",)), io.BytesIO()
    columns = fields.columns(predictor.objective)
    for sink in (output_files.Stream(out, columns, "tsv"), output_files.OutputFile(tmp_path / "out.tsv", columns, {})):
        rows = Table(io.BytesIO(b""), fields.kinds(predictor), file_format="text")
        assert stream.predict_rows(predictor, rows, sink, fields, show=False) == Tally()
    assert out.getvalue() == (tmp_path / "out.tsv").read_bytes() == b"row\tlabel\tprobability\ttruncated\terror\n"


def test_labels_are_known_by_their_names_and_as_the_files_of_the_data_write_them(predictor, tmp_path):
    names = predictor.labels
    glue = copy.copy(predictor)
    glue.format = dataclasses.replace(predictor.format, written=tuple(f"#{number}" for number in range(len(names))))
    labels = [names[3], "#3", f"#{len(names)}"]
    source = write_rows(tmp_path / "in.jsonl", [{"text": "a", "y": label} for label in labels])
    for model, unknown in ((glue, [2]), (predictor, [1, 2])):
        target = tmp_path / f"{len(unknown)}.jsonl"
        assert predict(model, source, target, stream.Fields(("text",), label="y")).errors == len(unknown)
        assert [row["row"] - 1 for row in read(target) if row["error"]] == unknown


def test_tags_of_entities_are_known_in_every_scheme(predictor):
    tagger = copy.copy(predictor)
    fmt = dataclasses.replace(predictor.format, label_names=("B-PER", "I-PER", "O"), metrics=("entity_f1", "accuracy"))
    tagger.format = fmt
    assert stream._known_labels(tagger) == {*fmt.label_names, *(f"{letter}-PER" for letter in "ESLU")}
    tagger.format = dataclasses.replace(fmt, metrics=("accuracy",))
    assert stream._known_labels(tagger) == set(fmt.label_names)


def test_arrays_are_rows_too(digits_run, tmp_path):
    predictor = datamux_jax.load(digits_run)
    images = np.random.default_rng(0).random((40, 8, 8), np.float32)
    images[7, 0, 0] = np.nan
    images[9] *= 255
    np.save(tmp_path / "images.npy", images)
    fields = stream.Fields((stream.FEATURES,))
    target = tmp_path / "out.jsonl"
    output = output_files.OutputFile(target, fields.columns(predictor.objective), {})
    source = stream.Features(str(tmp_path / "images.npy"), predictor.format)
    counts = stream.predict_rows(predictor, source, output, fields, show=False)
    reasons = {"holds a NaN or an infinity": 1, "has pixels outside of 0 to 1": 1}
    assert counts == Tally(rows=40, scored=38, errors=2, reasons=reasons)
    assert read(target)[7]["error"] == "holds a NaN or an infinity"
    assert read(target)[9]["error"].startswith("has pixels from ")
    with pytest.raises(InputError, match=r"holds shape \[40, 8, 8\].*\[n, 9, 8\]"):
        stream.Features(str(tmp_path / "images.npy"), dataclasses.replace(predictor.format, length=9))


@pytest.mark.parametrize(
    ("fields", "message"),
    [(stream.Fields(("a", "b")), "2 columns of text were named"), (stream.Fields(("a",), "a"), "One column is named twice")],
)
def test_columns_that_do_not_fit_the_model_are_refused(predictor, fields, message):
    with pytest.raises(InputError, match=message):
        fields.kinds(predictor)


def test_errors_of_the_thread_arrive():
    def items():
        yield 1
        raise KilledError

    made = background(items())
    assert next(made) == 1
    with pytest.raises(KilledError):
        next(made)
