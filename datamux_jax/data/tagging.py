"""Tagging: words with a label each, from CoNLL files of all kinds or from TensorFlow Datasets. Table `SETS`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamux_jax.data import conll, tfds_tasks
from datamux_jax.data.conll import Sentence
from datamux_jax.data.examples import TEST, TRAIN, VALIDATION, Examples, Files, Source, in_order, numbered
from datamux_jax.errors import InputError, choose

KEYS = ("name", "path", "train_file", "validation_file", "test_file", "format", "text", "label")
FORMATS = ("conll", "conllu")
# Split -> what a file's name has in it; "testa" is CoNLL-2003's validation split.
NAMES = {VALIDATION: ("dev", "valid", "testa"), TRAIN: ("train",), TEST: ("test",)}
NOT_A_WORD = "_"  # In TensorFlow Datasets, the part of speech of a range of words.


class Prepared(NamedTuple):
    """A data set in TensorFlow Datasets.

    Attributes:
      name: there.
      labels: the feature that holds them.
      splits: by our names.
      entities: the labels, in files those of the last column, mark entities.
    """

    name: str
    labels: str
    splits: Mapping[str, str]
    entities: bool = False


SETS: dict[str, Prepared] = {
    "ewt": Prepared("universal_dependencies/en_ewt", "upos", {TRAIN: "train", VALIDATION: "dev", TEST: "test"}),
    "conll2003": Prepared("conll2003", "ner", {TRAIN: "train", VALIDATION: "dev", TEST: "test"}, entities=True),
}


def find(data: Any) -> Files:
    """The files of each split; none if they come from TensorFlow Datasets.

    Args:
      data: `config.data`; reads `name`, a key of `SETS` or "" for any files; `path`, a folder in which files are known by their
        names, or the data_dir of TensorFlow Datasets ("": the default one); or `train_file`, `validation_file`, `test_file`.

    Raises:
      InputError: no such data set, folder or file, or more than one file for a split.
    """
    if data.name:
        choose(SETS, data.name, "The data set data.name =")
    named = {TRAIN: data.train_file, VALIDATION: data.validation_file, TEST: data.test_file}
    files: dict[str, tuple[Path, ...]] = {split: (Path(name).expanduser(),) for split, name in named.items() if name}
    if files and data.path:
        raise InputError(f"data.path = {data.path!r} and single files are both set. Give the folder, or each file, not both.")
    if not files and data.name and tfds_tasks.prepared_in(SETS[data.name].name, data.path):
        for key in ("format", "text", "label"):
            if data[key]:
                raise InputError(
                    f"data.{key} = {data[key]!r} is set, but the words and labels of {data.name} come from TensorFlow Datasets, where "
                    "they have names. Leave it empty, or name files (data.path)."
                )
        return {}
    files = files or _in_folder(data.path)
    for (path,) in files.values():
        if not path.is_file():
            raise InputError(f"{path} is no file. Check the path.")
    if TRAIN not in files:
        raise InputError("data.train_file = '' leaves nothing to train on. Name a file with words and their tags.")
    return files


def _in_folder(path: str) -> dict[str, tuple[Path, ...]]:
    folder = Path(path).expanduser()
    inside = sorted(file for file in folder.iterdir() if file.is_file()) if path and folder.is_dir() else []
    files: dict[str, tuple[Path, ...]] = {}
    for file in inside:
        split = next((split for split, names in NAMES.items() if any(name in file.name.lower() for name in names)), None)
        if split is not None:
            files[split] = (*files.get(split, ()), file)
    for split, paths in files.items():  # Universal Dependencies are released with the plain text beside the sentences.
        conllu = tuple(file for file in paths if file.suffix.lower() == ".conllu")
        files[split] = conllu if len(conllu) == 1 else paths
    several = [paths for paths in files.values() if len(paths) > 1]
    if TRAIN not in files or several:
        problem = (
            f"has several files for one split, {', '.join(file.name for file in several[0])}"
            if several
            else "has no file with 'train' in its name"
            if inside
            else "is no folder with files"
        )
        raise InputError(
            f"data.path = {path!r} {problem}. Give a folder with one file for each split (train; dev, valid or testa; test), or "
            "name the files: train=FILE,dev=FILE,test=FILE behind the config (data.train_file, data.validation_file, data.test_file)."
        )
    return {split: files[split] for split in (TRAIN, VALIDATION, TEST) if split in files}


def read(data: Any, files: Files) -> Source:
    """The splits, with the labels that occur in any of them, in order; tags that mark entities are IOB2 then.

    Raises:
      InputError: a line that cannot be read, tags that no scheme allows, or prepared data that cannot be read.
    """
    if files:
        sentences = {split: _of_file(path, data) for split, (path,) in files.items()}
    else:
        sentences = {split: list(rows) for split, rows in _prepared(SETS[data.name], data.path).items()}
    known = bool(data.name) and SETS[data.name].entities and not data.label
    entities = conll.to_iob2(list(itertools.chain(*sentences.values())), entities=known)
    names = in_order(tag for each in sentences.values() for sentence in each for tag in sentence.tags)
    what = "mark entities, scored by F1 of whole entities and accuracy" if entities else "mark no entities, scored by accuracy"
    print(f"{len(names)} tags, which {what}: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}", flush=True)
    splits = {split: _examples(each, names) for split, each in sentences.items()}
    return Source(splits, names, ("entity_f1", "accuracy") if entities else ("accuracy",))


def _examples(sentences: Sequence[Sentence], names: Sequence[str]) -> Examples:
    return Examples([sentence.words for sentence in sentences], [numbered(sentence.tags, names) for sentence in sentences])


def _of_file(path: Path, data: Any) -> list[Sentence]:
    ending = "conllu" if path.suffix.lower() == ".conllu" else "conll"
    if choose(FORMATS, data.format or ending, "The format data.format =") == "conll":
        return conll.read_columns(path, data.text, data.label)
    if data.text:
        raise InputError(f"data.text = {data.text!r}, but the words of CoNLL-U are in a fixed column. Leave it empty.")
    return conll.read_conllu(path, data.label)


def _prepared(known: Prepared, folder: str) -> dict[str, list[Sentence]]:
    splits = tfds_tasks.read(known.name, folder, tuple(known.splits.values()), ("tokens", known.labels))
    sentences: dict[str, list[Sentence]] = {}
    for split, name in known.splits.items():
        sentences[split] = []
        for number, row in enumerate(splits[name], start=1):
            words = [(word, tag) for word, tag in zip(row["tokens"], row[known.labels], strict=True) if tag != NOT_A_WORD]
            if words:
                where = Path(f"{known.name}, split {name}")
                sentences[split].append(Sentence(where, [w for w, _ in words], [t for _, t in words], [number] * len(words)))
    return sentences
