"""Data sets of tasks from files: layouts of GLUE, tables, and what is refused."""

import os

import numpy as np
import pytest

from datamux_jax.data import glue, pipeline, sources
from datamux_jax.errors import InputError
from tests.conftest import small_config


def config_of(source, **changes):
    settings = {"source": source, "length": 16} | changes
    return small_config(**{f"data__{key}": value for key, value in settings.items()})


def load(source, **changes):
    return sources.load(config_of(source, **changes).data)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


HEADER = "index\tsentence1\tsentence2\tlabel\n"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
MNLI = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
# Task -> files in one of its layouts, and the examples of each split that are in them.
LAYOUTS = {
    "sst2": [
        (
            {"train.tsv": 'sentence\tlabel\n"good \t1\nbad\t0\n', "dev.tsv": "sentence\tlabel\nso so\t0\n"},
            {"train": (['"good ', "bad"], [1, 0]), "validation": (["so so"], [0])},
        ),
    ],
    "cola": [
        (
            {"train.tsv": "gj04\t1\t\tOne.\ngj04\t0\t*\tTwo.\n", "dev.tsv": "x\t0\t*\tThree."},
            {"train": (["One.", "Two."], [1, 0]), "validation": (["Three."], [0])},
        ),
        (
            {
                "in_domain_train.tsv": "gj04\t1\t\tOne.\n",
                "in_domain_dev.tsv": "x\t0\t*\tTwo.\n",
                "out_of_domain_dev.tsv": "y\t1\t\tThree.",
                "README": "not data",
            },
            {"train": (["One."], [1]), "validation": (["Two.", "Three."], [0, 1])},
        ),
    ],
    "mrpc": [
        (
            {"train.tsv": MRPC + "1\t1\t2\ta\tb\r\n", "dev.tsv": MRPC + "0\t3\t4\tc\td\r\n"},
            {"train": ([("a", "b")], [1]), "validation": ([("c", "d")], [0])},
        ),
        (
            {"msr_paraphrase_train.txt": MRPC + '1\t1\t2\t"a\tb\r\n', "msr_paraphrase_test.txt": MRPC + "0\t3\t4\tc\td\r\n"},
            {"train": ([('"a', "b")], [1]), "test": ([("c", "d")], [0])},
        ),
    ],
    "stsb": [
        (
            {"train.tsv": STSB + "0\tg\tf\ty\t1\ts\ts\ta\tb\t5.000\n", "dev.tsv": STSB + "0\tg\tf\ty\t1\ts\ts\tc\td\t2\n"},
            {"train": ([("a", "b")], [5.0]), "validation": ([("c", "d")], [2.0])},
        ),
        (
            {
                "sts-train.csv": "main\tMSR\t2012\t0001\t5.0\ta, b\tb\nmain\tnews\t2016\t0012\t4\tx\ty\tsource\tsource\n",
                "sts-dev.csv": "main\tMSR\t2012\t0001\t0.25\tc\td\n",
                "sts-test.csv": "main\tMSR\t2012\t0001\t1\te\tf\n",
            },
            {
                "train": ([("a, b", "b"), ("x", "y")], [5.0, 4.0]),
                "validation": ([("c", "d")], [0.25]),
                "test": ([("e", "f")], [1.0]),
            },
        ),
    ],
    "qqp": [
        (
            {
                "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\ta\tb\t1\n2\t3\t4\tbroken\nby a line\t0\n"
                "3\t5\t6\t\td\t0\n",
                "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\te\tf\t0\n",
            },
            {"train": ([("a", "b"), ("", "d")], [1, 0]), "validation": ([("e", "f")], [0])},
        )
    ],
    "mnli": [
        (
            {
                "train.tsv": MNLI + "0\tg\ta\tb\tneutral\tneutral\n",
                "dev_matched.tsv": MNLI + "0\tg\tc\td\tneutral\tcontradiction\n",
                "dev_mismatched.tsv": MNLI.replace("label1", "label1\tlabel2") + "0\tg\te\tf\tx\ty\tentailment\n",
            },
            {
                "train": ([("a", "b")], [1]),
                "validation_matched": ([("c", "d")], [2]),
                "validation_mismatched": ([("e", "f")], [0]),
            },
        )
    ],
    "qnli": [
        (
            {
                "train.tsv": HEADER.replace("sentence1\tsentence2", "question\tsentence") + "0\ta\tb\tnot_entailment\n",
                "dev.tsv": HEADER.replace("sentence1\tsentence2", "question\tsentence") + "0\tc\td\tentailment\n",
            },
            {"train": ([("a", "b")], [1]), "validation": ([("c", "d")], [0])},
        )
    ],
    "rte": [
        (
            {"train.tsv": HEADER + "0\ta\tb\tentailment\n", "dev.tsv": HEADER + "0\tc\td\tnot_entailment\n"},
            {"train": ([("a", "b")], [0]), "validation": ([("c", "d")], [1])},
        )
    ],
    "wnli": [
        (
            {"train.tsv": HEADER + "0\ta\tb\t1\n", "dev.tsv": HEADER + "0\tc\td\t0\n"},
            {"train": ([("a", "b")], [1]), "validation": ([("c", "d")], [0])},
        )
    ],
}


def as_lists(source):
    return {split: (examples.inputs, examples.labels.tolist()) for split, examples in source.splits.items()}


@pytest.mark.parametrize(("task", "layout"), [(task, i) for task, layouts in LAYOUTS.items() for i in range(len(layouts))])
def test_every_layout_of_every_task(tmp_path, task, layout):
    files, expected = LAYOUTS[task][layout]
    assert len(LAYOUTS[task]) == len(glue.TASKS[task].layouts)
    source = load("glue", name=task, path=write(tmp_path / "a", files))
    assert as_lists(source) == expected
    dtype = np.float32 if task == "stsb" else np.int32
    assert all(examples.labels.dtype == dtype for examples in source.splits.values())
    inside = write(tmp_path / "b", {f"{glue.TASKS[task].folder}/{name}": content for name, content in files.items()})
    assert as_lists(load("glue", name=task, path=inside)) == expected


def test_the_development_pairs_of_mrpc_are_those_that_glue_lists(tmp_path):
    files = {
        "msr_paraphrase_train.txt": MRPC + "1\t1\t2\ta\tb\r\n0\t3\t4\tc\td\r\n1\t4\t3\te\tf\r\n0\t1\t4\tg\th\r\n",
        "msr_paraphrase_test.txt": MRPC + "0\t5\t6\ti\tj\r\n",
        "dev_ids.tsv": "1\t4\n3\t4\n",
    }
    path = write(tmp_path, files)
    expected = {
        "train": ([("a", "b"), ("e", "f")], [1, 1]),
        "validation": ([("c", "d"), ("g", "h")], [0, 0]),
        "test": ([("i", "j")], [0]),
    }
    assert as_lists(load("glue", name="mrpc", path=path)) == expected
    write(tmp_path, {"dev_ids.tsv": "1\t4\n7\t8\n"})
    message = r"dev_ids.tsv lists 1 pairs of ids that msr_paraphrase_train.txt does not have \(line 2: 7 and 8\)"
    with pytest.raises(InputError, match=message):
        load("glue", name="mrpc", path=path)


def test_damaged_questions_are_counted_once(tmp_path, capsys):
    files, _ = LAYOUTS["qqp"][0]
    path = write(tmp_path, files)
    load("glue", name="qqp", path=path)
    load("glue", name="qqp", path=path)
    problem = (
        "damaged rows are left out: line 3 has 4 fields, but the header names 6; line 4 has 2 fields, but the header names 6."
    )
    assert capsys.readouterr().out == f"{tmp_path / 'train.tsv'}: 2 {problem}\n"


def test_every_task_has_its_layouts_tested_and_its_metrics():
    assert set(LAYOUTS) == set(glue.TASKS)
    metrics = {name: task.metrics for name, task in glue.TASKS.items()}
    assert metrics["cola"] == ("matthews",)
    assert metrics["mrpc"] == metrics["qqp"] == ("accuracy", "f1")
    assert metrics["stsb"] == ("pearson", "spearman")
    assert {metrics[name] for name in ("sst2", "mnli", "qnli", "rte", "wnli")} == {("accuracy",)}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"train.tsv": "sentence\tlabel\nx\t2\n"}, {}, r"train.tsv, line 2: the label '2' is none of 0, 1"),
        ({"train.tsv": b"sentence\tlabel\nx\t1\nx\xff\t1\n"}, {}, r"train.tsv, line 3: the row is not UTF-8 at byte 2"),
        ({"train.tsv": "sentence\tlabel\nx\n"}, {}, r"line 2: the row has 1 fields, but the header names 2"),
        ({"train.tsv": "sentence\tlabel\n \t1\n"}, {}, r"line 2: the row has no text in the column 'sentence'"),
        ({"train.tsv": "text\tlabel\nx\t1\n"}, {}, r"has no column 'sentence'. Its columns are: text, label"),
        ({"train.tsv": "sentence\tlabel\n"}, {}, r"The split 'train' has no examples in .*train.tsv"),
        (
            {"dev.tsv": "sentence\tlabel\n"},
            {},
            r"has no training file of this task in it. For sst2 name a folder with train.tsv and dev",
        ),
        ({"x": ""}, {"name": "stsb"}, r"with train.tsv and dev.tsv, or sts-train.csv and sts-dev.csv and sts-test.csv; or"),
        ({"x": ""}, {"name": "sst"}, r"The task data.name = 'sst' does not exist. Choose one of: cola, mnli, mrpc"),
        ({"sts-train.csv": "a\tb\tc\td\tx\te\tf\n"}, {"name": "stsb"}, r"sts-train.csv, line 1: the label 'x' is no number"),
        (
            {"x": ""},
            {"text": "sentence"},
            r"data.text = 'sentence' is set, but data.source = 'glue' does not read it; it reads data.name",
        ),
    ],
)
def test_wrong_files_of_glue_are_refused(tmp_path, files, settings, message):
    with pytest.raises(InputError, match=message):
        load("glue", **{"name": "sst2", "path": write(tmp_path, files)} | settings)


def test_a_missing_folder_is_refused():
    with pytest.raises(InputError, match=r"data.path = '/no/such' is no folder"):
        load("glue", name="sst2", path="/no/such")


TABLE = {"text": "t", "label": "y"}


def test_classes_of_a_table_are_read_from_it(tmp_path):
    folder = write(tmp_path, {"a.tsv": "y\tt\n10\tten\n9\tnine\n10\tmore\n", "b.csv": 'y,t\n9,"x, y"\n'})
    source = load("table", train_file=f"{folder}/a.tsv", test_file=f"{folder}/b.csv", validation_share=0.0, **TABLE)
    assert source.label_names == ("9", "10")
    assert as_lists(source) == {"train": (["ten", "nine", "more"], [1, 0, 1]), "test": (["x, y"], [0])}
    assert source.metrics == ("accuracy",)


def test_pairs_numbers_and_headerless_tables(tmp_path):
    folder = write(tmp_path, {"a.tsv": "a\t0.5\tb\nc\t-1e1\td\n"})
    settings = {"train_file": f"{folder}/a.tsv", "header": False, "numbers": True, "validation_share": 0.0}
    source = load("table", **settings, text="1", text_pair="3", label="2")
    assert as_lists(source) == {"train": ([("a", "b"), ("c", "d")], [0.5, -10.0])}
    assert (source.label_names, source.metrics) == ((), ("pearson", "spearman"))


def test_rows_are_held_out_where_no_file_is_named(tmp_path):
    rows = [f"text {i % 150}\t{i % 2}\n" for i in range(300)]
    path = write(tmp_path, {"a.tsv": "t\ty\n" + "".join(rows)}) + "/a.tsv"
    source = load("table", train_file=path, validation_share=0.2, **TABLE)
    train, held_out = source.split("train"), source.split("validation")
    assert len(train) + len(held_out) == 300
    assert 30 < len(held_out) < 90
    assert not set(train.inputs) & set(held_out.inputs)
    named = load("table", train_file=path, validation_file=path, validation_share=0.2, **TABLE)
    assert len(named.split("train")) == len(named.split("validation")) == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": ""}, r"needs data.train_file"),
        ({"train_file": "none.tsv"}, r"data.train_file = 'none.tsv' is no file"),
        ({"label": ""}, r"data.label = '' names no column"),
        ({"text": ""}, r"data.text = '' names no column"),
        ({"text": "x"}, r"a.tsv has no column 'x'. Its columns are: t, y. Name one of them with data.text, "),
        ({"text_pair": "t"}, r"name one column twice"),
        ({"numbers": True}, r"a.tsv, line 2: the label 'yes' is no number"),
        ({"validation_file": "b.tsv"}, r"b.tsv, line 3: the label 'maybe' is none of the training file's: no, yes"),
        ({"train_file": "c.tsv"}, r"Every row of .*c.tsv has the label 'yes'"),
        ({"format": "xml"}, r"The format 'xml' does not exist"),
        ({"path": "."}, r"data.path = '.' is set, but data.source = 'table' does not read it"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"a.tsv": "t\ty\na\tyes\nb\tno\n", "b.tsv": "t\ty\na\tyes\nb\tmaybe\n", "c.tsv": "t\ty\na\tyes\n"})
    with pytest.raises(InputError, match=message):
        load("table", **{"train_file": "a.tsv", **TABLE} | changes)


def test_a_source_is_read_once_until_a_file_changes(tmp_path):
    path = tmp_path / "a.tsv"
    write(tmp_path, {"a.tsv": "t\ty\na\t1\nb\t2\n"})
    settings = {"train_file": str(path), "validation_share": 0.0, **TABLE}
    first = load("table", **settings)
    assert load("table", **settings) is first
    _, splits = pipeline.load(config_of("table", **settings))
    assert pipeline.load(config_of("table", **settings))[1] is splits
    path.write_text("t\ty\na\t1\nb\t2\nc\t1\n")
    os.utime(path, ns=(1, 1))
    assert len(load("table", **settings).split("train")) == 3


def test_labels_of_numbers_stay_numbers_in_batches(tmp_path):
    path = write(tmp_path, {"a.tsv": "t\ty\na\t0.5\nb\t2\n"}) + "/a.tsv"
    config = config_of("table", train_file=path, numbers=True, validation_share=0.0, **TABLE)
    fmt, splits = pipeline.load(config)
    assert fmt.numbers
    batch = next(pipeline.train_iterator(splits["train"], groups=1, instances=2, seed=0))
    assert batch["label"].dtype == np.float32
    assert sorted(batch["label"].ravel()) == [0.5, 2.0]
    assert set(batch) == {"inputs", "mask", "label", "weight"}
