"""The tasks of GLUE, from the files as they are published, or from TensorFlow Datasets. Table `TASKS`.

Sources: Wang et al. 2019 (https://gluebenchmark.com) and its download script; CoLA's own release (https://nyu-mll.github.io/cola);
STS-B's own release (http://ixa2.si.ehu.eus/stswiki); the files of Microsoft's paraphrase corpus, of which MRPC is made, and
GLUE's list of those of its pairs that are the development set (dev_ids.tsv, used by `format_mrpc` of the download script).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamux_jax.data import tfds_tasks
from datamux_jax.data.examples import TEST, TRAIN, VALIDATION, Examples, Files, Source, number
from datamux_jax.data.tables import Row, Table
from datamux_jax.errors import InputError, choose, few

GLUE_FILES = {TRAIN: ("train.tsv",), VALIDATION: ("dev.tsv",)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How files hold a task; all are fields between tabs, without quoting.

    Attributes:
      texts: columns of the texts.
      label: column of the label.
      files: split -> files, one after the other. The training files must be there, other splits may be absent.
      header: the first row names the columns; False: they are numbered.
      ids: columns of a pair of ids. Where there are any, the last file of the validation split lists such pairs, without a header:
        the rows of the training files that it names are the validation split, the others are what is trained on.
    """

    texts: tuple[str, ...]
    label: str
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: GLUE_FILES)
    header: bool = True
    ids: tuple[str, ...] = ()


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
      damaged: the published files have damaged rows (a question with a line end in it), which are counted and left out, and may have
        empty texts.
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
                {
                    TRAIN: ("msr_paraphrase_train.txt",),
                    VALIDATION: ("msr_paraphrase_train.txt", "dev_ids.tsv"),
                    TEST: ("msr_paraphrase_test.txt",),
                },
                ids=("#1 ID", "#2 ID"),
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
    layouts = [dict.fromkeys(name for names in layout.files.values() for name in names) for layout in task.layouts]
    wanted = ", or ".join(" and ".join(names) for names in layouts)
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
        return Source(splits, task.names, task.metrics, task.written or ())
    names = {path.name for path in files[TRAIN]}
    layout = next(layout for layout in task.layouts if set(layout.files[TRAIN]) == names)
    if layout.ids and VALIDATION in files:
        rows = _held_out(task, layout, files[VALIDATION])
        rows |= {split: _rows(task, layout, paths) for split, paths in files.items() if split not in rows}
    else:
        rows = {split: _rows(task, layout, paths) for split, paths in files.items()}
    splits = {split: _examples([row.texts for row in each], [row.label for row in each], task) for split, each in rows.items()}
    return Source(splits, task.names, task.metrics, task.written or ())


class Labelled(NamedTuple):
    """A row: its texts, the number of its class or its number, and its pair of ids, if the layout has them."""

    texts: tuple[str, ...]
    label: Any
    ids: tuple[str, ...]


def _rows(task: Task, layout: Layout, paths: Sequence[Path]) -> list[Labelled]:
    columns = dict.fromkeys(layout.texts, "string" if task.damaged else "text") | dict.fromkeys(
        (layout.label, *layout.ids), "value"
    )
    rows: list[Labelled] = []
    for path in paths:
        damaged: list[str] = []
        with Table(path, columns, file_format="tsv", header=layout.header) as table:
            for row in table.rows() if task.damaged else table.good():
                if row.problem:
                    damaged.append(f"line {row.line} {row.problem}")
                    continue
                texts, ids = (tuple(row.values[column] for column in those) for those in (layout.texts, layout.ids))
                rows.append(Labelled(texts, _label(row, path, layout.label, task), ids))
        if damaged:
            print(f"{path}: {len(damaged):,} damaged rows are left out: {few(damaged, 3)}.", flush=True)
    return rows


def _held_out(task: Task, layout: Layout, paths: Sequence[Path]) -> dict[str, list[Labelled]]:
    """The training and the validation split, of the training files and, last, the list of pairs of ids.

    Raises:
      InputError: the list names a pair that the training files do not have.
    """
    *training, listing = paths
    with Table(listing, {"1": "value", "2": "value"}, file_format="tsv", header=False) as table:
        lines = {(row.values["1"], row.values["2"]): row.line for row in table.good()}
    rows = _rows(task, layout, training)
    there = {row.ids for row in rows}
    missing = [f"line {line}: {' and '.join(ids)}" for ids, line in lines.items() if ids not in there]
    if missing:
        raise InputError(
            f"{listing} lists {len(missing):,} pairs of ids that {' and '.join(path.name for path in training)} does not have "
            f"({few(missing, 3)}). Check that both files are those of this task, or take the list away to do without a validation "
            "split."
        )
    return {
        TRAIN: [row for row in rows if row.ids not in lines],
        VALIDATION: [row for row in rows if row.ids in lines],
    }


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
