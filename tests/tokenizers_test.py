"""Tokenizers: published vocabularies against values worked out by hand, trained ones, and what cannot be read."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from datamux_jax.data import subword_models, tokenizers
from datamux_jax.data.corpus import open_corpus
from datamux_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer
from datamux_jax.errors import InputError
from tests.conftest import small_config

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["hello", ",", "world", "!", "un", "##aff", "##able", "Hello", "中", "##o"]  # Ids 5 to 14.


def vocab_txt(folder, pieces=PIECES, specials=SPECIALS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*specials, *pieces]) + "\n", encoding="utf-8")
    return folder / "vocab.txt"


def text():
    """Words of which many are equally frequent, so that ties must be broken."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnoé"), size=rng.integers(2, 7))) for _ in range(300)]
    return [" ".join(rng.choice(words, size=12)) + ", End." for _ in range(100)]


def config_of(tmp_path, **changes):
    folder = tmp_path / "text"
    if not folder.exists():
        folder.mkdir()
        (folder / "a.txt").write_text("\n\n".join(text()), encoding="utf-8")
    settings = {"source": "files", "path": str(folder), "cache": str(tmp_path / "cache"), "vocab_size": 400} | changes
    return small_config(**{f"data__{key}": value for key, value in settings.items()}).data


def trained(kind, lowercase=True):
    return SubwordTokenizer.parse(subword_models.train(kind, text, 400, lowercase), kind)


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("Hello, World!", [5, 6, 7, 8]),
        ("  unaffable\tHELLO ", [9, 10, 11, 5]),
        ("Hellö", [5]),  # Accents are stripped with lower-casing.
        ("hello中world", [5, 13, 7]),  # Chinese characters stand alone.
        ("helloo hellos", [5, 14, 1]),  # One piece that is not there makes the whole word unknown.
        ("hello [MASK]!", [5, 4, 8]),
        ("hello \ud800", [5, 1]),
        ("", []),
    ],
)
def test_wordpiece_of_a_bert_vocabulary(tmp_path, line, pieces):
    tokenizer = tokenizers.load(vocab_txt(tmp_path))
    assert tokenizer.vocab_size == 15
    ids, mask, _ = tokenizer.encode([line], 8)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.tolist() == [[2, *pieces, 3] + [0] * (6 - len(pieces))]
    assert mask.tolist() == [[1] * (len(pieces) + 2) + [0] * (6 - len(pieces))]
    (document,) = tokenizer.encode_documents([line])
    assert document.tolist() == [2, *pieces, 3]


def test_a_text_is_cut_before_its_separator(tmp_path):
    tokenizer = tokenizers.load(vocab_txt(tmp_path))
    ids, mask, _ = tokenizer.encode(["hello, world!", "world"], 4)
    assert ids.tolist() == [[2, 5, 6, 3], [2, 7, 3, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    with pytest.raises(InputError, match=r"data.length = 2.*at least 3"):
        tokenizer.encode(["hello"], 2)


def test_upper_case_stays_where_the_vocabulary_has_it(tmp_path):
    path = vocab_txt(tmp_path)
    cased = tokenizers.load(path, lowercase=False)
    assert cased.encode_documents(["Hello hello HELLO"])[0].tolist() == [2, 12, 5, 1, 3]
    assert cased.fingerprint != tokenizers.load(path).fingerprint
    # What was published with the vocabulary knows better than the config.
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizers.load(path, lowercase=True) == cased


def test_decoding_leaves_special_tokens_out(tmp_path):
    tokenizer = tokenizers.load(vocab_txt(tmp_path))
    ids, _, _ = tokenizer.encode(["Unaffable [MASK] world!"], 10)
    assert tokenizer.decode([*ids[0], 15, 99, -1]) == "unaffable world!"
    bpe = trained("bpe", lowercase=False)
    assert bpe.decode(bpe.encode(["naïve  ﷺ, End."], 30)[0][0]) == "naïve  ﷺ, End."


def test_documents_of_bytes():
    tokenizer = ByteTokenizer()
    first, second, third = tokenizer.encode_documents(["aé", "", "\ud800"])
    assert first.tolist() == [1, 4 + 0x61, 4 + 0xC3, 4 + 0xA9, 2]
    assert second.tolist() == [1, 2]
    assert tokenizer.decode(third) == "?"  # A lone surrogate has no bytes.
    assert first.dtype == np.int32


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_published_wordpiece_vocabulary_has_the_published_tokens(tmp_path, family):
    pieces = [f"w{number}" for number in range(30522)]
    pieces[0] = "[PAD]"
    pieces[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens, size = tokenizers.load(vocab_txt(tmp_path, pieces, [])).special_tokens(5, family)
    assert size == 30522
    assert (tokens.pad, tokens.cls, tokens.sep, tokens.mask) == (0, 101, 102, 103)
    assert (tokens.filler, tokens.index) == (680, 678)
    # Same size, but another order: not the published one.
    tokens, size = tokenizers.load(vocab_txt(tmp_path / "other", pieces[100:] + pieces[:100], [])).special_tokens(5, family)
    assert (tokens.cls, tokens.filler, size) == (1, 30522, 30528)


def test_published_byte_pair_vocabulary_has_the_published_tokens(tmp_path):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "h": 4, "i": 5, "Ġ": 6, "hi": 7, "Ġhi": 8}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), 50264)} | {"<mask>": 50264}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n", encoding="utf-8")
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.encode(["hi hi <mask>"], 8)[0].tolist() == [[0, 7, 8, 50264, 2, 1, 1, 1]]
    tokens, size = tokenizer.special_tokens(3, "roberta")
    assert size == 50265
    assert (tokens.pad, tokens.mask, tokens.filler, tokens.index) == (1, 50264, 50000, 50263)
    assert tokenizer.special_tokens(3, "bert")[0].filler == 50265


def test_index_tokens_come_behind_any_other_vocabulary(tmp_path):
    tokens, size = tokenizers.load(vocab_txt(tmp_path)).special_tokens(3, "bert")
    assert (tokens.pad, tokens.cls, tokens.sep, tokens.mask) == (0, 2, 3, 4)
    used = [tokens.filler, *(tokens.index - instance for instance in range(3))]
    assert sorted(used) == [15, 16, 17, 18]
    assert size == 24
    assert ByteTokenizer().special_tokens(3, "bert")[1] == 264


@pytest.mark.parametrize("kind", ["bytes", "wordpiece", "bpe", "vocab.txt"])
def test_tokenizers_are_saved_and_equal_by_content(tmp_path, kind):
    def make():
        if kind == "bytes":
            return ByteTokenizer()
        return tokenizers.load(vocab_txt(tmp_path)) if kind == "vocab.txt" else trained(kind)

    first = make()
    first.save(tmp_path / "run" / "tokenizer")
    for same in (make(), tokenizers.load(tmp_path / "run" / "tokenizer"), tokenizers.load(tmp_path / "run")):
        assert same == first
        assert hash(same) == hash(first)
        assert same.fingerprint == first.fingerprint
        np.testing.assert_array_equal(same.encode(["Hello, end"], 12)[0], first.encode(["Hello, end"], 12)[0])
    other = trained("wordpiece", lowercase=False)
    assert other != first
    assert other.fingerprint != first.fingerprint


def test_padding_and_truncation_of_a_file_do_not_matter(tmp_path):
    tokenizer = trained("wordpiece")
    fields = json.loads(tokenizer.content)
    fields["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    fields["padding"] = pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    (tmp_path / "some.json").write_text(json.dumps(fields, indent=2))
    assert tokenizers.load(tmp_path / "some.json") == tokenizer
    assert len(tokenizer.encode_documents([text()[0]])[0]) > 8


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_deterministic(kind):
    contents = {trained(kind).content for _ in range(4)}
    assert len(contents) == 1


def test_trained_wordpiece_is_like_bert():
    tokenizer = trained("wordpiece")
    vocabulary = tokenizer._library.get_vocab()
    assert [vocabulary[token] for token in SPECIALS] == [0, 1, 2, 3, 4]
    assert 300 < tokenizer.vocab_size <= 400
    assert "é" not in vocabulary
    assert "##," not in vocabulary  # Punctuation never continues a word.
    assert "É" not in vocabulary
    assert "é" in trained("wordpiece", lowercase=False)._library.get_vocab()
    ids = tokenizer.encode_documents(text()[:50])
    assert sum(map(len, ids)) < 0.6 * sum(map(len, text()[:50]))
    assert not any((document == vocabulary["[UNK]"]).any() for document in ids)


def test_trained_byte_pairs_are_like_roberta():
    tokenizer = trained("bpe")
    vocabulary = tokenizer._library.get_vocab()
    assert [vocabulary[token] for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode(tokenizer.encode(["ABC Ж"], 20)[0][0]) == "abc ж"


def test_a_rare_character_beyond_the_alphabet_is_unknown(monkeypatch):
    monkeypatch.setattr(subword_models, "MAX_ALPHABET", 3)
    content = subword_models.train("wordpiece", lambda: ["aaa bbb cc d e aab", "aab bb c"] * 3, 60, True)
    vocabulary = json.loads(content)["model"]["vocab"]
    assert {token for token in vocabulary if len(token) == 1} == {"a", "b", "c"}


def test_a_tokenizer_is_trained_once(tmp_path, monkeypatch):
    data = config_of(tmp_path)
    first = tokenizers.open_tokenizer("wordpiece", data, open_corpus(data))
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
    calls = []
    train = subword_models.train
    monkeypatch.setattr(subword_models, "train", lambda *args: calls.append(args) or train(*args))
    assert tokenizers.open_tokenizer("wordpiece", data, open_corpus(data)) == first
    assert not calls
    for changes in ({"vocab_size": 390}, {"lowercase": False}, {"validation_share": 0.1}):
        other = config_of(tmp_path, **changes)
        tokenizers.open_tokenizer("wordpiece", other, open_corpus(other))
    tokenizers.open_tokenizer("bpe", data, open_corpus(data))
    assert len(calls) == 4


def test_a_failed_training_leaves_nothing_to_use(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left")

    data = config_of(tmp_path)
    corpus = open_corpus(data)
    monkeypatch.setattr(tokenizers.workdir, "write_text", full)
    with pytest.raises(InputError, match=r"No space left.*data.cache"):
        tokenizers.open_tokenizer("wordpiece", data, corpus)
    monkeypatch.undo()
    assert tokenizers.open_tokenizer("wordpiece", data, corpus).vocab_size > 300


def test_held_out_text_is_not_trained_on(tmp_path):
    (tmp_path / "text").mkdir()
    lines = ["the plain words"] * 19 + ["ЖЖЖ"]  # Every twentieth document is held out.
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(lines * 3), encoding="utf-8")
    data = config_of(tmp_path, validation_share=0.05)
    vocabulary = tokenizers.open_tokenizer("wordpiece", data, open_corpus(data))._library.get_vocab()
    assert "p" in vocabulary
    assert "ж" not in vocabulary


def test_of_much_text_a_part_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "TRAINING_BYTES", 1000)
    seen = []
    content = trained("bpe").content
    monkeypatch.setattr(subword_models, "train", lambda _, texts, *__: seen.extend(texts()) or content)
    data = config_of(tmp_path, validation_share=0.0)
    corpus = open_corpus(data)
    tokenizers.open_tokenizer("bpe", data, corpus)
    every = [document.text for document in corpus.documents("train")]
    step = -(-corpus.size("train") // 1000)
    assert step > 3
    assert seen == every[::step]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("words", {}, r"'words' does not exist.*Choose bytes, or wordpiece or bpe"),
        ("", {}, r"'' does not exist"),
        ("{tmp}/nothing.json", {}, r"nothing.json' does not exist"),
        ("{tmp}/empty", {}, r"empty holds none.*vocab.txt"),
        ("{tmp}/broken.json", {}, r"broken.json cannot be read"),
        ("{tmp}/list.json", {}, r"list.json cannot be read"),
        ("{tmp}/latin.txt", {}, r"latin.txt cannot be read: 'utf-8'"),
        ("{tmp}/bare/vocab.txt", {}, r"vocab.txt has no \[PAD\], \[MASK\]"),
        ("{tmp}/pairs", {}, r"vocab.json cannot be read"),
        ("wordpiece", {"vocab_size": 20}, r"data.vocab_size = 20 is too small for a wordpiece.*alone are \d\d\d?\. Raise"),
        ("bpe", {"vocab_size": -3}, r"data.vocab_size = -3 is too small for a bpe.*261"),
    ],
)
def test_tokenizers_that_cannot_be_had_are_refused(tmp_path, name, changes, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text('{"version": "1.0"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "latin.txt").write_bytes("[PAD]\ncafé".encode("latin-1"))
    vocab_txt(tmp_path / "bare", specials=["[UNK]", "[CLS]", "[SEP]"])
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "vocab.json").write_text("{}")
    data = config_of(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        tokenizers.open_tokenizer(name.format(tmp=tmp_path), data, open_corpus(data))


def test_training_needs_running_text(tmp_path):
    data = config_of(tmp_path, source="cldr")
    with pytest.raises(InputError, match=r"'bpe' is trained on running text, but data.source = 'cldr' has none"):
        tokenizers.open_tokenizer("bpe", data)
    assert tokenizers.open_tokenizer("bytes", data) == ByteTokenizer()


def test_nothing_is_said_on_stderr_and_forks_can_encode():
    code = """
        import os
        from datamux_jax.data import subword_models, tokenizers
        texts = ["some text to encode", "and some more of it"] * 500
        for kind in ("wordpiece", "bpe"):
            tokenizer = tokenizers.SubwordTokenizer.parse(subword_models.train(kind, lambda: texts, 300, True), kind)
            expected = tokenizer.encode(texts, 16)[0].sum()
            if (child := os.fork()) == 0:
                os._exit(int(tokenizer.encode(texts, 16)[0].sum() != expected))
            assert os.waitpid(child, 0)[1] == 0
    """
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
