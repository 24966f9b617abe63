"""The tasks of GLUE, from the files as they are published, or from TensorFlow Datasets. Table `TASKS`.

Sources: Wang et al. 2019 (https://gluebenchmark.com) and its download script; CoLA's own release (https://nyu-mll.github.io/cola);
STS-B's own release (http://ixa2.si.ehu.eus/stswiki); the files of Microsoft's paraphrase corpus, of which MRPC is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax.data import tfds_tasks
from datamux_jax.data.examples import TEST, TRAIN, VALIDATION, Examples, Files, Source, number
from datamux_jax.data.tables import Row, Table
from datamux_jax.errors import InputError, choose

GLUE_FILES = {TRAIN: ("train.tsv",), VALIDATION: ("dev.tsv",)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How files hold a task; all are fields between tabs, without quoting.

    Attributes:
      texts: columns of the texts.
      label: column of the label.
      files: split -> files, one after the other. The training files must be there, other splits may be absent.
      header: the first row names the columns; False: they are numbered.
    """

    texts: tuple[str, ...]
    label: str
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: GLUE_FILES)
    header: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
      folder: in the folder that GLUE's download script makes.
      names: of the labels, in the order of their numbers, as TensorFlow Datasets has them; none: numbers.
      layouts: of files, the first one whose training files are there.
      texts: features of the texts in TensorFlow Datasets.
      metrics: that GLUE reports.
      written: the labels as the files write them; None: the names.
      damaged: the published files have damaged rows (a question with a line end in it), which are left out, and may have empty texts.
      splits: of TensorFlow Datasets.
    """

    folder: str
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    texts: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    written: tuple[str, ...] | None = None
    damaged: bool = False
    splits: tuple[str, ...] = (TRAIN, VALIDATION)


SENTENCES = ("sentence1", "sentence2")
BINARY = ("0", "1")
MATCHED, MISMATCHED = f"{VALIDATION}_matched", f"{VALIDATION}_mismatched"
ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    "cola": Task(
        "CoLA",
        ("unacceptable", "acceptable"),
        (
            Layout(("4",), "2", header=False),
            Layout(
                ("4",),
                "2",
                {TRAIN: ("in_domain_train.tsv",), VALIDATION: ("in_domain_dev.tsv", "out_of_domain_dev.tsv")},
                header=False,
            ),
        ),
        ("sentence",),
        ("matthews",),
        BINARY,
    ),
    "sst2": Task("SST-2", ("negative", "positive"), (Layout(("sentence",), "label"),), ("sentence",), written=BINARY),
    "mrpc": Task(
        "MRPC",
        ("not_equivalent", "equivalent"),
        (
            Layout(("#1 String", "#2 String"), "Quality"),
            Layout(
                ("#1 String", "#2 String"),
                "Quality",
                {TRAIN: ("msr_paraphrase_train.txt",), TEST: ("msr_paraphrase_test.txt",)},
            ),
        ),
        SENTENCES,
        ("accuracy", "f1"),
        BINARY,
    ),
    "stsb": Task(
        "STS-B",
        (),
        (
            Layout(SENTENCES, "score"),
            Layout(
                ("6", "7"),
                "5",
                {TRAIN: ("sts-train.csv",), VALIDATION: ("sts-dev.csv",), TEST: ("sts-test.csv",)},
                header=False,
            ),
        ),
        SENTENCES,
        ("pearson", "spearman"),
    ),
    "qqp": Task(
        "QQP",
        ("not_duplicate", "duplicate"),
        (Layout(("question1", "question2"), "is_duplicate"),),
        ("question1", "question2"),
        ("accuracy", "f1"),
        BINARY,
        damaged=True,
    ),
    "mnli": Task(
        "MNLI",
        ("entailment", "neutral", "contradiction"),
        (
            Layout(
                SENTENCES,
                "gold_label",
                {TRAIN: ("train.tsv",), MATCHED: ("dev_matched.tsv",), MISMATCHED: ("dev_mismatched.tsv",)},
            ),
        ),
        ("premise", "hypothesis"),
        splits=(TRAIN, MATCHED, MISMATCHED),
    ),
    "qnli": Task("QNLI", ENTAILMENT, (Layout(("question", "sentence"), "label"),), ("question", "sentence")),
    "rte": Task("RTE", ENTAILMENT, (Layout(SENTENCES, "label"),), SENTENCES),
    "wnli": Task("WNLI", ("not_entailment", "entailment"), (Layout(SENTENCES, "label"),), SENTENCES, written=BINARY),
}


def find(data: Any) -> Files:
    """The files of a task; none if it comes from TensorFlow Datasets.

    Args:
      data: `config.data`; reads `name`, the task, and `path`: a folder with its files, GLUE's folder of all tasks, or the data_dir of
        TensorFlow Datasets ("": the default one).

    Raises:
      InputError: no such task or folder, or not the files of the task.
    """
    task = TASKS[choose(TASKS, data.name, "The task data.name =")]
    if tfds_tasks.prepared_in(f"glue/{data.name}", data.path):
        return {}
    root = Path(data.path).expanduser()
    folder = root / task.folder if (root / task.folder).is_dir() else root
    for layout in task.layouts:
        if all((folder / name).is_file() for name in layout.files[TRAIN]):
            files = {split: tuple(folder / name for name in names) for split, names in layout.files.items()}
            return {split: paths for split, paths in files.items() if all(path.is_file() for path in paths)}
    wanted = ", or ".join(" and ".join(name for names in layout.files.values() for name in names) for layout in task.layouts)
    raise InputError(
        f"data.path = {data.path!r} {'is no folder' if not root.is_dir() else 'has no training file of this task in it'}. For "
        f"{data.name} name a folder with {wanted}; or leave it empty for TensorFlow Datasets."
    )


def read(data: Any, files: Files) -> Source:
    """The splits of a task.

    Raises:
      InputError: a damaged row, an unknown label, or a prepared data set that cannot be read.
    """
    task = TASKS[data.name]
    if not files:
        splits = {
            split: _examples([tuple(row[text] for text in task.texts) for row in rows], [row["label"] for row in rows], task)
            for split, rows in tfds_tasks.read(f"glue/{data.name}", data.path, task.splits, (*task.texts, "label")).items()
        }
        return Source(splits, task.names, task.metrics)
    names = {path.name for path in files[TRAIN]}
    layout = next(layout for layout in task.layouts if set(layout.files[TRAIN]) == names)
    return Source({split: _of_files(task, layout, paths) for split, paths in files.items()}, task.names, task.metrics)


def _of_files(task: Task, layout: Layout, paths: Any) -> Examples:
    columns = dict.fromkeys(layout.texts, "string" if task.damaged else "text") | {layout.label: "value"}
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for path in paths:
        with Table(path, columns, file_format="tsv", header=layout.header) as table:
            for row in table.rows() if task.damaged else table.good():
                if not row.problem:
                    texts.append(tuple(row.values[column] for column in layout.texts))
                    labels.append(_label(row, path, layout.label, task))
    return _examples(texts, labels, task)


def _label(row: Row, path: Path, column: str, task: Task) -> Any:
    """The number of a class, or a number.

    Raises:
      InputError: it is none.
    """
    label = row.values[column]
    if not task.names:
        return number(label, path, row.line)
    written = task.written or task.names
    if label not in written:
        raise InputError(
            f"{path}, line {row.line}: the label {label!r} is none of {', '.join(written)}. Check that the files are those of this "
            "task, and correct the line."
        )
    return written.index(label)


def _examples(texts: list[tuple[str, ...]], labels: list[Any], task: Task) -> Examples:
    inputs: Any = texts if len(task.texts) == 2 else [text for (text,) in texts]
    return Examples(inputs, np.array(labels, np.int32 if task.names else np.float32))
