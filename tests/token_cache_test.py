"""Tokenised running text: what is in it, when it is made anew, and that no interruption spoils it."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from datamux_jax.data import token_cache, tokenizers
from datamux_jax.data.corpus import open_corpus
from datamux_jax.data.token_cache import chunks, tokenised
from datamux_jax.data.tokenizers import ByteTokenizer
from datamux_jax.errors import InputError
from tests.conftest import small_config

DOCUMENTS = [f"Document {number}, naïve {'and longer ' * (number % 4)}." for number in range(60)]


def config_of(tmp_path, **changes):
    folder = tmp_path / "text"
    if not folder.exists():
        folder.mkdir()
        for number in range(3):
            text = "\n\n".join(DOCUMENTS[20 * number : 20 * number + 20])
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = {"source": "files", "path": str(folder), "cache": str(tmp_path / "cache"), "validation_share": 0.1} | changes
    return small_config(**{f"data__{key}": value for key, value in settings.items()}).data


def make(data, tokenizer=None):
    return tokenised(data, open_corpus(data), tokenizer or ByteTokenizer())


def whole(documents):
    return np.concatenate(ByteTokenizer().encode_documents([document.strip() for document in documents]))


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "tokens").iterdir())


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_CHARACTERS", 200)


def test_documents_follow_one_another(tmp_path, small_blocks):
    splits = make(config_of(tmp_path))
    assert list(splits) == ["train", "validation"]
    np.testing.assert_array_equal(splits["validation"], whole(DOCUMENTS[9::10]))
    np.testing.assert_array_equal(splits["train"], whole([DOCUMENTS[n] for n in range(60) if n % 10 != 9]))
    assert splits["train"].dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        splits["train"][0] = 1
    (entry,) = entries(tmp_path)
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["source"]["document"] == "paragraph"
    assert meta["tokenizer"]["kind"] == "ByteTokenizer"
    assert meta["splits"]["train"]["documents"] == 54
    assert meta["splits"]["validation"]["tokens"] == len(splits["validation"])


def test_subwords_are_parallel_and_exact(tmp_path, small_blocks):
    data = config_of(tmp_path, vocab_size=100)
    corpus = open_corpus(data)
    tokenizer = tokenizers.open_tokenizer("wordpiece", data, corpus)
    expected = [tokenizer.encode_documents([document.text])[0] for document in corpus.documents("train")]
    np.testing.assert_array_equal(make(data, tokenizer)["train"], np.concatenate(expected))


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode_documents(self, texts):
            return [np.array([69_999], np.int32) for _ in texts]

    splits = make(config_of(tmp_path), Wide())
    assert splits["train"].dtype == np.uint32
    assert splits["train"].max() == 69_999


def test_a_complete_entry_is_only_opened(tmp_path, monkeypatch, capsys):
    data = config_of(tmp_path)
    first = make(data)
    assert "Tokenising train (kB)" in capsys.readouterr().out
    monkeypatch.setattr(ByteTokenizer, "encode_documents", lambda *_: pytest.fail("tokenised again"))
    again = make(data)
    assert capsys.readouterr().out == ""
    assert all(np.array_equal(first[split], again[split]) for split in first)


def test_whatever_changes_the_tokens_makes_a_new_entry(tmp_path):
    make(config_of(tmp_path))
    make(config_of(tmp_path, length=99, lowercase=False, vocab_size=5))  # Of no account for bytes.
    assert len(entries(tmp_path)) == 1
    make(config_of(tmp_path), ByteTokenizer(first_byte_id=9))
    make(config_of(tmp_path, document="line"))
    make(config_of(tmp_path, validation_share=0.2))
    make(config_of(tmp_path, validation_share=0.0))
    assert len(entries(tmp_path)) == 5
    path = tmp_path / "text" / "1.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("naïve", "naÏve"), encoding="utf-8")
    assert not np.array_equal(make(config_of(tmp_path))["train"], whole(DOCUMENTS))
    assert len(entries(tmp_path)) == 6


class Stop(Exception):
    pass


@pytest.mark.parametrize("written", [0.0, 0.5, 1.0])
def test_an_interruption_anywhere_is_made_up_for(tmp_path, monkeypatch, small_blocks, written):
    """For every block: before, in the middle of, and after the writing of its tokens, with the state not yet replaced."""
    append = token_cache._append
    lengths = []

    def counting(path, tokens):
        lengths.append(len(tokens))
        append(path, tokens)

    monkeypatch.setattr(token_cache, "_append", counting)
    expected = make(config_of(tmp_path))
    count = len(lengths)
    assert count >= 10
    for stop in range(count):
        lengths.clear()

        def stopping(path, tokens, stop=stop):
            lengths.append(len(tokens))
            append(path, tokens if len(lengths) <= stop else tokens[: int(written * len(tokens))])
            if len(lengths) > stop:
                raise Stop

        data = config_of(tmp_path, cache=str(tmp_path / f"cache{stop}"))
        monkeypatch.setattr(token_cache, "_append", stopping)
        with pytest.raises(Stop):
            make(data)
        (entry,) = (tmp_path / f"cache{stop}" / "tokens").iterdir()
        assert token_cache._opened(entry) is None
        lengths.clear()
        monkeypatch.setattr(token_cache, "_append", counting)
        splits = make(data)
        assert len(lengths) == count - stop  # Only what was missing.
        for split, tokens in expected.items():
            np.testing.assert_array_equal(splits[split], tokens)


def test_files_that_were_cut_are_made_anew(tmp_path, small_blocks):
    data = config_of(tmp_path)
    expected = {split: tokens.copy() for split, tokens in make(data).items()}
    (entry,) = entries(tmp_path)
    for damage in (
        lambda: os.truncate(entry / "train.bin", 100),
        lambda: (entry / "validation.bin").unlink(),
        lambda: os.truncate(entry / "train.bin", 10**6),
        lambda: (entry / "meta.json").unlink(),
    ):
        damage()
        splits = make(data)
        assert all(np.array_equal(splits[split], tokens) for split, tokens in expected.items())


def test_an_unreadable_description_is_refused(tmp_path):
    data = config_of(tmp_path)
    make(data)
    (entries(tmp_path)[0] / "meta.json").write_text("{")
    with pytest.raises(InputError, match=r"meta.json in the cache cannot be read.*delete the folder"):
        make(data)


def test_a_full_disk_is_named_and_made_up_for(tmp_path, monkeypatch, small_blocks):
    data = config_of(tmp_path)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    corpus = open_corpus(data)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written at .*: No space left on device.*data.cache or \$DATAMUX_CACHE"):
        tokenised(data, corpus, ByteTokenizer())
    monkeypatch.undo()
    np.testing.assert_array_equal(make(data)["validation"], whole(DOCUMENTS[9::10]))


def test_a_cache_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written at .*file/.*Not a directory.*data.cache"):
        make(config_of(tmp_path, cache=str(tmp_path / "file")))


def test_the_cache_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAMUX_CACHE", str(tmp_path / "elsewhere"))
    make(config_of(tmp_path, cache=""))
    assert (tmp_path / "elsewhere" / "tokens").is_dir()
    monkeypatch.delenv("DATAMUX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(config_of(tmp_path, cache=""))
    assert (tmp_path / "home" / ".cache" / "datamux_jax" / "tokens").is_dir()


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'validation' is empty"):
        make(config_of(tmp_path, validation_share=0.01))


STOPPING = """
    import time
    from pathlib import Path
    from tests.token_cache_test import config_of, make, token_cache

    folder = Path({folder!r})
    append, blocks = token_cache._append, []

    def stopping(path, tokens):
        append(path, tokens)
        blocks.append(len(tokens))
        print("block", len(blocks), flush=True)
        while len(blocks) == 2 and not (folder / "go").exists():
            time.sleep(0.01)

    token_cache._append, token_cache.BLOCK_CHARACTERS = stopping, 200
    print("sum", sum(int(tokens.sum()) for tokens in make(config_of(folder)).values()), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that tokenise, and wait after their second block for the file `go`."""
    config_of(tmp_path)
    for path in (tmp_path / "text").iterdir():
        os.utime(path, (0, 0))  # The hashes of old files are remembered; they would wait for one another to read new ones.
    processes = []

    def start():
        command = [sys.executable, "-c", textwrap.dedent(STOPPING).format(folder=str(tmp_path))]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_killed_process_is_made_up_for(tmp_path, start):
    process = start()
    assert [process.stdout.readline() for _ in range(2)] == ["block 1\n", "block 2\n"]
    process.kill()
    process.communicate(timeout=30)
    (entry,) = entries(tmp_path)
    assert 0 < json.loads((entry / "meta.json").read_text())["splits"]["train"]["documents"] < 54
    np.testing.assert_array_equal(make(config_of(tmp_path))["train"], whole([DOCUMENTS[n] for n in range(60) if n % 10 != 9]))
    assert len(entries(tmp_path)) == 1


def test_of_several_processes_one_works_and_the_others_wait(tmp_path, start):
    first = start()
    assert first.stdout.readline() == "block 1\n"
    others = [start() for _ in range(2)]
    for process in others:
        assert process.stdout.readline() == "Another process is tokenising this text; waiting for it.\n"
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, *others)]
    total = sum(int(tokens.sum()) for tokens in make(config_of(tmp_path)).values())
    assert outputs[0].endswith(f"sum {total}\n")
    assert outputs[1:] == [f"sum {total}\n"] * 2


def test_chunks_are_a_view_without_the_rest(tmp_path):
    tokens = make(config_of(tmp_path))["train"]
    rows = chunks(tokens, 50)
    assert rows.shape == (len(tokens) // 50, 50)
    assert np.shares_memory(rows, tokens)
    np.testing.assert_array_equal(rows.reshape(-1), tokens[: rows.size])
    assert chunks(tokens, len(tokens)).shape == (1, len(tokens))
    with pytest.raises(InputError, match=rf"data.length = {len(tokens) + 1}, but .* has {len(tokens)} tokens"):
        chunks(tokens, len(tokens) + 1)
