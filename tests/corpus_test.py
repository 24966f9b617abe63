"""Running text: encodings, documents, splits, bad bytes, and prepared data sets."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from datamux_jax.data import text_files
from datamux_jax.data.corpus import open_corpus
from datamux_jax.errors import InputError
from tests.conftest import small_config


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    return tmp_path / "text"


def config_of(folder, **changes):
    settings = {
        "source": "files",
        "path": str(folder),
        "cache": str(folder.parent / "cache"),
        "validation_share": 0.0,
    } | changes
    return small_config(**{f"data__{key}": value for key, value in settings.items()}).data


def read(folder, split="train", start=0, **changes):
    return [document.text for document in open_corpus(config_of(folder, **changes)).documents(split, start)]


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def age(*paths):
    """Makes files older than the moment in which a change may go unnoticed."""
    for path in paths:
        os.utime(path, ns=(path.stat().st_mtime_ns - 10**10,) * 2)


TEXT = "Ein Absatz,\nhart  umbrochen: ﷺ 𝄞\n\n\n  \t\nZweiter\u00a0Absatz.\n"
PARAGRAPHS = ["Ein Absatz, hart umbrochen: ﷺ 𝄞", "Zweiter Absatz."]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings_and_line_ends(folder, encoding, newline):
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes none for a named byte order.
    write(folder, "a.txt", mark + TEXT.replace("\n", newline), encoding)
    assert read(folder) == PARAGRAPHS
    lines = ["Ein Absatz,", "hart  umbrochen: ﷺ 𝄞", "Zweiter\u00a0Absatz."]
    assert read(folder, document="line") == lines
    (whole,) = read(folder, document="file")
    assert whole == TEXT.strip()


@pytest.mark.parametrize(
    ("content", "offset", "message"),
    [
        (b"abc\xffdef", 3, "UTF-8"),
        (b"abcde\xc3", 5, "UTF-8"),  # Cut in the middle of a character.
        (b"\xef\xbb\xbfab\xe9c", 5, "UTF-8"),  # After a byte-order mark.
        ("naïve ﷺ ".encode() + b"\xfe", 11, "UTF-8"),
        (b"abc\xe2\x82(", 3, "UTF-8"),  # Starts in one block and is found out in the next one.
        (b"\xff\xfea\0\x00\xdc", 4, "UTF-16-LE"),
        (b"\xff\xfea\0b", 4, "UTF-16-LE"),
    ],
)
@pytest.mark.parametrize("block", [2, 4, 1 << 20])
def test_a_bad_byte_is_named_with_its_offset(folder, monkeypatch, block, content, offset, message):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    write(folder, "a.txt", "good")
    write(folder, "b.txt", content)
    with pytest.raises(InputError, match=rf"b\.txt is no {message} text: the byte at offset {offset} .*iconv"):
        open_corpus(config_of(folder))


def test_text_without_its_byte_order_mark_is_refused(folder):
    write(folder, "a.txt", "abc".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"a.txt has a zero byte at offset 1.*UTF-16"):
        open_corpus(config_of(folder))


def test_files_of_folders_and_patterns(folder):
    for name in ("b.txt", "a/z.TXT", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "notes.md"):
        write(folder, name, name)
    assert read(folder) == ["a/b/c.txt", "a/z.TXT", "b.txt"]
    assert read(folder / "notes.md") == ["notes.md"]
    assert read(folder / "*.txt") == ["b.txt"]
    assert read(folder / "**" / "*.txt") == ["a/b/c.txt", "b.txt"]


def test_names_with_wildcards_are_taken_as_they_are(folder):
    write(folder / "[a]", "x*.txt", "here")
    assert read(folder / "[a]") == ["here"]
    assert read(folder / "[a]" / "x*.txt") == ["here"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, r"data.path = '' names no file"),
        ({"path": "/no/such/place"}, r"'/no/such/place' names no file.*books"),
        ({"path": "/no/*.txt"}, r"names no file"),
        ({}, r"text' has no .txt file in it"),
        ({"document": "sentence"}, r"data.document = 'sentence' does not exist.*file, line, paragraph"),
        ({"train_split": "test"}, r"'test' does not exist: text files are one split"),
        ({"validation_split": "test"}, r"'test' does not exist: text files are one split.*validation_share"),
        ({"validation_share": 0.6}, r"data.validation_share = 0.6"),
        ({"validation_share": -0.1}, r"data.validation_share = -0.1"),
        ({"validation_share": float("nan")}, r"data.validation_share = nan"),
        ({"source": "digits"}, r"data.source = 'digits' does not exist.*files, tfds"),
    ],
)
def test_wrong_settings_are_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        open_corpus(config_of(folder, **changes))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(folder):
    write(folder, "a.txt", "text").chmod(0)
    with pytest.raises(InputError, match=r"a.txt cannot be read: Permission denied"):
        open_corpus(config_of(folder))


def test_a_broken_link_is_refused(folder):
    (folder / "a.txt").symlink_to(folder / "gone")
    with pytest.raises(InputError, match=r"a.txt cannot be read: No such file"):
        open_corpus(config_of(folder))


@pytest.mark.parametrize(
    ("document", "kind"), [("paragraph", "'line'"), ("line", "'paragraph'"), ("file", "'paragraph' or 'line'")]
)
def test_a_document_without_end_is_refused(folder, monkeypatch, document, kind):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT", 50)
    path = write(folder, "a.txt", "short line\n\n" * 20)
    assert len(read(folder)) == 20
    write(folder, path.name, "short\n\n" + ("long line " * 4 + ("\n" if document == "paragraph" else "")) * 2)
    with pytest.raises(InputError, match=rf"a.txt has a document of more than 50.*data.document to {kind}"):
        read(folder, document=document)


def test_every_kth_document_is_held_out(folder):
    write(folder, "a.txt", "\n\n".join(map(str, range(12))))
    write(folder, "b.txt", "\n\n".join(map(str, range(12, 20))))
    assert read(folder, "validation", validation_share=0.25) == ["3", "7", "11", "15", "19"]
    assert read(folder, validation_share=0.25) == [str(n) for n in range(20) if n % 4 != 3]
    assert read(folder, start=10, validation_share=0.25) == ["10", "12", "13", "14", "16", "17", "18"]
    assert read(folder, "validation", start=8, validation_share=0.25) == ["11", "15", "19"]
    assert open_corpus(config_of(folder, validation_share=0.25)).splits == ("train", "validation")
    assert open_corpus(config_of(folder, validation_share=0.0)).splits == ("train",)


def test_positions_and_numbers_lead_on(folder):
    for name in ("a.txt", "b.txt"):
        write(folder, name, "\n\n".join(["x" * 700] * 5))
    corpus = open_corpus(config_of(folder))
    documents = list(corpus.documents("train"))
    assert [document.number for document in documents] == list(range(10))
    positions = [document.position for document in documents]
    assert positions == sorted(positions)
    assert positions[4] == 3
    assert positions[-1] == corpus.extent("train") == 7


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("\n \n", "train", r"The split 'train' of the running text .* has no document with any text"),
        ("one\n\ntwo", "validation", r"'validation' is empty: one document in 100.*Raise data.validation_share"),
    ],
)
def test_an_empty_split_is_refused(folder, text, split, message):
    write(folder, "a.txt", text)
    with pytest.raises(InputError, match=message):
        read(folder, split, validation_share=0.01)


def test_the_fingerprint_is_that_of_names_and_content(folder, tmp_path):
    write(folder, "a.txt", "one\n\ntwo")
    write(folder, "b.txt", "three")
    first = open_corpus(config_of(folder)).fingerprint
    for name, text in (("a.txt", "one\n\ntwo"), ("b.txt", "three")):
        write(tmp_path / "copy", name, text)
    copied = config_of(tmp_path / "copy", cache=str(tmp_path / "other"))
    assert open_corpus(copied).fingerprint == first
    seen = {first}
    for changes in ({"document": "line"}, {"validation_share": 0.5}, {"validation_share": 0.25}):
        seen.add(open_corpus(config_of(folder, **changes)).fingerprint)
    assert len(seen) == 4
    modified = (folder / "b.txt").stat().st_mtime_ns
    write(folder, "b.txt", "thrEe")
    os.utime(folder / "b.txt", ns=(modified, modified))  # Same size, changed within a tick of the clock.
    seen.add(open_corpus(config_of(folder)).fingerprint)
    write(folder, "b.txt", "three")
    (folder / "b.txt").rename(folder / "c.txt")
    seen.add(open_corpus(config_of(folder)).fingerprint)
    assert len(seen) == 6


def test_unchanged_files_are_read_once(folder, monkeypatch):
    paths = [write(folder, f"{name}.txt", name) for name in "abc"]
    age(*paths)
    hashed = []
    digest = text_files._digest
    monkeypatch.setattr(text_files, "_digest", lambda file: hashed.append(file.name) or digest(file))
    first = open_corpus(config_of(folder)).fingerprint
    assert hashed == ["a.txt", "b.txt", "c.txt"]
    assert open_corpus(config_of(folder)).fingerprint == first
    assert len(hashed) == 3
    age(paths[1])
    assert open_corpus(config_of(folder)).fingerprint == first
    assert hashed[3:] == ["b.txt"]
    write(folder, "b.txt", "B")
    assert open_corpus(config_of(folder)).fingerprint != first
    (folder.parent / "cache" / "files").joinpath(*os.listdir(folder.parent / "cache" / "files"), "memory.json").write_text("{")
    assert open_corpus(config_of(folder)).fingerprint != first


def test_a_file_that_changes_while_it_is_read_is_refused(folder):
    write(folder, "a.txt", "one")
    write(folder, "b.txt", "two")
    documents = open_corpus(config_of(folder)).documents("train")
    assert next(documents).text == "one"
    write(folder, "b.txt", "three")
    with pytest.raises(InputError, match=r"b.txt changed while it was being read"):
        next(documents)


# TensorFlow Datasets. Its builder classes register themselves by their names, once a process.

OTHER = (
    "\n_START_ARTICLE_\nNumber {}\n_START_SECTION_\nHistory\n_START_PARAGRAPH_\nIt began._NEWLINE_It ended."  # As in wiki40b.
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data_dir with the data set `datamux_sayings`, prepared as array_record."""
    import numpy as np
    import tensorflow_datasets as tfds

    class DatamuxSayings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # To look for a checksum file beside this one, the library would need one more package.

        def _info(self):
            features = {"saying": tfds.features.Text(), "other": tfds.features.Text(), "year": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train", 600), "test": self._generate_examples("test", 5)}

        def _generate_examples(self, split, count):
            for number in range(count):
                text = " " if number == 3 else f" naïve {split} {number} "
                yield number, {"saying": text, "other": OTHER.format(number), "year": number}

    folder = tmp_path_factory.mktemp("tfds")
    DatamuxSayings(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tfds_config(folder, **changes):
    settings = {"source": "tfds", "name": "datamux_sayings", "path": str(folder), "text_key": "saying"} | changes
    return config_of(folder, **settings)


def test_records_of_a_data_set_are_documents(prepared):
    corpus = open_corpus(tfds_config(prepared, validation_split="test"))
    assert corpus.splits == ("train", "test")
    test = list(corpus.documents("test"))
    assert sorted(document.text for document in test) == [f"naïve test {n}" for n in (0, 1, 2, 4)]  # An empty one is left out.
    train = list(corpus.documents("train"))
    assert len(train) == 599
    assert list(corpus.documents("train", 300)) == [document for document in train if document.number >= 300]
    assert train[-1].position <= corpus.extent("train") == 600
    assert corpus.size("train") > 100 * corpus.size("test")


def test_line_breaks_that_a_data_set_writes_as_words_are_line_breaks(prepared):
    corpus = open_corpus(tfds_config(prepared, text_key="other", validation_split="test"))
    texts = {document.text for document in corpus.documents("test")}
    assert "Number 3\nHistory\nIt began.\nIt ended." in texts
    assert len(texts) == 5


def test_documents_of_a_data_set_are_held_out(prepared):
    corpus = open_corpus(tfds_config(prepared, validation_share=0.01))
    held_out = list(corpus.documents("validation"))
    assert [document.number for document in held_out] == [99, 199, 299, 399, 499, 599]
    rest = [document.number for document in corpus.documents("train")]
    assert len(rest) + len(held_out) == 599
    assert not set(rest) & {document.number for document in held_out}


def test_slices_and_what_changes_the_fingerprint(prepared):
    part = open_corpus(tfds_config(prepared, train_split="train[:10]"))
    assert 9 <= len(list(part.documents("train[:10]"))) <= 10
    changes = [{}, {"train_split": "test"}, {"text_key": "other"}, {"train_split": "train[:10]"}, {"validation_split": "test"}]
    assert len({open_corpus(tfds_config(prepared, **change)).fingerprint for change in changes}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, r"needs data.name"),
        ({"name": "no_such_data"}, r"'no_such_data' is unknown to TensorFlow Datasets"),
        ({"name": "wikipedia/20230601.xx"}, r"'wikipedia/20230601.xx' cannot be opened"),
        ({"name": "wiki40b/en:9.9.9"}, r"'wiki40b/en:9.9.9' cannot be opened.*only: 1.3.0"),
        (
            {"name": "wikipedia/20230601.en"},
            r"are not there, and array_record is needed.*builder\('wikipedia/20230601.en', data_dir='.*', file_format='array_record'\)",
        ),
        ({"text_key": "text"}, r"data.text_key = 'text': this feature of datamux_sayings/1.0.0 does not exist.*other, saying"),
        ({"text_key": "year"}, r"data.text_key = 'year': this feature of .* holds no text"),
        ({"train_split": "dev"}, r"'dev' of datamux_sayings/1.0.0 does not exist.*test, train"),
        ({"validation_split": "train[:x]"}, r"'train\[:x\]' of .* does not exist"),
        ({"train_split": "validation", "validation_share": 0.1}, r"'validation' is also the name"),
    ],
)
def test_data_sets_that_cannot_be_had_are_refused(prepared, capfd, changes, message):
    with pytest.raises(InputError, match=message):
        open_corpus(tfds_config(prepared, **changes))
    assert capfd.readouterr().err == ""


def test_an_empty_slice_is_refused(prepared):
    with pytest.raises(InputError, match=r"'train\[:0\]' of the running text .* has no document"):
        list(open_corpus(tfds_config(prepared, train_split="train[:0]")).documents("train[:0]"))


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 1000)])
def test_damaged_data_are_refused(prepared, tmp_path, damage):
    shutil.copytree(prepared, tmp_path / "data")
    damage(next((tmp_path / "data" / "datamux_sayings" / "1.0.0").glob("*train*")))
    with pytest.raises(InputError, match=r"datamux_sayings/1.0.0 cannot be read: .* Prepare or copy them anew"):
        list(open_corpus(tfds_config(tmp_path / "data")).documents("train"))


def test_the_wrong_file_format_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    info = tmp_path / "data" / "datamux_sayings" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"in the format tfrecord only, and array_record is needed.*another folder"):
        open_corpus(tfds_config(tmp_path / "data"))


def test_reading_a_data_set_says_nothing(prepared):
    code = f"""
        from pathlib import Path
        from tests.corpus_test import open_corpus, tfds_config
        from absl import logging
        logging.set_verbosity(logging.WARNING)  # As it is in programs; the tests are quieter.
        assert len(list(open_corpus(tfds_config(Path({str(prepared)!r}))).documents("train"))) == 599
        try:
            open_corpus(tfds_config(Path({str(prepared)!r}), name="lm1b"))
        except ValueError as error:
            assert "are not there" in str(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
