"""Words with labels: files, schemes of entities, tokens, and batches."""

import numpy as np
import pytest

from datamux_jax.data import conll, pipeline, sources
from datamux_jax.data.conll import Sentence
from datamux_jax.data.encoding import encode_pairs, encode_words
from datamux_jax.data.formats import Format
from datamux_jax.data.tokenizers import ByteTokenizer, load
from datamux_jax.errors import InputError
from tests.conftest import small_config

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP S-ORG
rejects VBZ B-VP O
European NNP B-NP B-MISC
Union NNP I-NP E-MISC

Peter NNP B-NP S-PER


"""
CONLLU = """# newdoc id = a
# text = It's a test.
1-2	It's	_	_	_	_	_	_	_	_
1	It	it	PRON	PRP	_	0	_	_	_
2	's	be	AUX	VBZ	_	0	_	_	_
3	a b	a	DET	DT	_	0	_	_	_
3.1	gone	go	VERB	VBN	_	_	_	_	_

# text = Ok
1	Ok	ok	INTJ	UH	_	0	_	_	_
"""


def config_of(**changes):
    settings = {"source": "tagging", "length": 16} | changes
    return small_config(objective="tagging", **{f"data__{key}": value for key, value in settings.items()})


def read(tmp_path, content, file="train.conll", **changes):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = sources.load(config_of(**{"path": str(tmp_path)} | changes).data)
    train = source.split("train")
    return [
        (words, [source.label_names[label] for label in labels])
        for words, labels in zip(train.inputs, train.labels, strict=True)
    ], source.metrics


def test_conll_columns(tmp_path):
    sentences, metrics = read(tmp_path, CONLL)
    assert sentences == [
        (["EU", "rejects", "European", "Union"], ["B-ORG", "O", "B-MISC", "I-MISC"]),
        (["Peter"], ["B-PER"]),
    ]
    assert metrics == ("entity_f1", "accuracy")
    sentences, metrics = read(tmp_path, CONLL.replace("\n", "\r\n").replace(" ", "\t"), label="2")
    assert sentences[0] == (["EU", "rejects", "European", "Union"], ["NNP", "VBZ", "NNP", "NNP"])
    assert metrics == ("accuracy",)
    assert read(tmp_path, CONLL, text="2", label="1")[0][1] == (["NNP"], ["Peter"])


def test_conllu_leaves_out_ranges_empty_nodes_and_comments(tmp_path):
    expected = [(["It", "'s", "a b"], ["PRON", "AUX", "DET"]), (["Ok"], ["INTJ"])]
    assert read(tmp_path, CONLLU, "en-train.conllu") == (expected, ("accuracy",))
    assert read(tmp_path, CONLLU, "en-train.conllu", label="xpos")[0][1] == (["Ok"], ["UH"])


SCHEMES = {
    "I-A I-A O I-B B-B I-B I-A": "B-A I-A O B-B B-B I-B B-A",  # IOB1
    "O I-A B-A B-A": "O B-A B-A B-A",
    "I-A": "B-A",
    "B-A I-A O B-B B-B I-B B-A": "B-A I-A O B-B B-B I-B B-A",  # IOB2
    "B-A O": "B-A O",
    "S-A O B-B E-B B-A I-A E-A S-A": "B-A O B-B I-B B-A I-A I-A B-A",  # BIOES
    "U-A O B-B L-B B-A I-A L-A U-A": "B-A O B-B I-B B-A I-A I-A B-A",  # BILOU
    "B-A I-A L-A": "B-A I-A I-A",
    "B-A-B I-A-B": "B-A-B I-A-B",
    "B I O B B": "B I O B B",  # Entities of one type.
    "I I O I B I": "B I O B B I",
    "S O B E B I E S": "B O B I B I I B",
}


def sentence(tags):
    return Sentence("f.conll", ["w"] * len(tags.split()), tags.split(), list(range(1, 1 + len(tags.split()))))


@pytest.mark.parametrize("tags", SCHEMES)
def test_every_scheme_becomes_iob2(tags):
    one = sentence(tags)
    assert conll.to_iob2([one])
    assert " ".join(one.tags) == SCHEMES[tags]
    assert conll.to_iob2([one], entities="-" not in tags)
    assert " ".join(one.tags) == SCHEMES[tags]


@pytest.mark.parametrize("tags", ["NOUN VERB", "O O", "O B-A X", "B- O", "I E I", "O S L O"])
def test_other_tags_stay(tags):
    one = sentence(tags)
    assert not conll.to_iob2([one])
    assert " ".join(one.tags) == tags


GOOD = "EU S-ORG\nrejects O\n\nPeter B-PER\nX E-PER\n\n"


def test_one_odd_tag_does_not_switch_the_entities_off(tmp_path, capsys):
    for content, changes in ((GOOD * 20 + "typo B_LOC\n", {}), (GOOD + "typo B_LOC\n", {"name": "conll2003"})):
        line = len(content.splitlines())
        with pytest.raises(
            InputError,
            match=rf"train.conll, line {line}: the tag 'B_LOC' is neither O nor a part of an entity.*Correct the tag",
        ):
            read(tmp_path, content, **changes)
    assert read(tmp_path, GOOD + "typo B_LOC\n")[1] == ("accuracy",)  # Three of four: they may be anything.
    assert "5 tags, which mark no entities, scored by accuracy: B-PER, B_LOC, E-PER, O, S-ORG" in capsys.readouterr().out
    assert read(tmp_path, GOOD)[1] == ("entity_f1", "accuracy")
    assert (
        "4 tags, which mark entities, scored by F1 of whole entities and accuracy: B-ORG, B-PER, I-PER, O"
        in capsys.readouterr().out
    )
    chunks = "a NN B-NP\nb VB O\n"
    assert read(tmp_path, chunks, name="conll2003", label="2")[1] == ("accuracy",)


def test_comments_of_column_files_are_no_words(tmp_path):
    words = [(["EU", "x"], ["B-ORG", "O"])]
    for comment in ("# id 17 domain=en", "# id\tdomain=en", "# text = EU x", "#comment", "# a comment of five words"):
        assert read(tmp_path, f"{comment}\nEU B-ORG\nx O\n") == (words, ("entity_f1", "accuracy"))
        assert read(tmp_path, f"a O\n\n# newdoc = 1\n{comment}\nEU B-ORG\nx O\n")[0][1:] == words
    four = "# id 5239 domain=en\nEU _ _ B-ORG\nx _ _ O\n"
    assert read(tmp_path, four)[0] == words


def test_words_with_a_hash_stay_words(tmp_path):
    assert read(tmp_path, "# O\n1 B-A\n# B-A\n#now O\n")[0] == [(["#", "1", "#", "#now"], ["O", "B-A", "B-A", "O"])]
    assert read(tmp_path, "#a HT\nb N\n\nc N\n#a HT\n#d X\n")[0][0] == (["#a", "b"], ["HT", "N"])
    assert read(tmp_path, "a NN O\n# # O\nb NN O\n", label="2")[0] == [(["a", "#", "b"], ["NN", "#", "NN"])]


@pytest.mark.parametrize("content", ["# comment\na O\n", "a O\n\n# C\nb O\n", "a O\n# id 17 new\nb O\n"])
def test_lines_with_a_hash_that_may_be_words_or_comments_are_refused(tmp_path, content):
    line = 1 + next(i for i, text in enumerate(content.splitlines()) if text.startswith("#"))
    with pytest.raises(InputError, match=rf"train.conll, line {line}: the line begins with # and may be a comment or a word"):
        read(tmp_path, content)


def test_the_scheme_shows_in_all_sentences_together():
    sentences = [sentence("I-A O"), sentence("I-A B-A")]
    conll.to_iob2(sentences)
    assert [one.tags for one in sentences] == [["B-A", "O"], ["B-A", "B-A"]]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("I-A O B-A", r"f.conll, line 1, starts an entity with I-, as in IOB1, but f.conll, line 3, has a B-"),
        ("B-A I-B", r"line 2, starts an entity with I-"),
        ("S-A E-A", r"line 2: the tag 'E-A' between 'S-A' and 'O' is not BIOES"),
        ("B-A O S-A", r"line 1: the tag 'B-A' between 'O' and 'O'"),
        ("B-A I-A S-A", r"line 2: the tag 'I-A' between 'B-A' and 'S-A'"),
        ("B-A E-B", r"line 1: the tag 'B-A' between 'O' and 'E-B'"),
        ("S-A U-A", r"the letters S, U: E and S are of BIOES, L and U of BILOU"),
    ],
)
def test_tags_of_no_scheme_are_refused(tags, message):
    with pytest.raises(InputError, match=message):
        conll.to_iob2([sentence(tags)])


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("train.conll", "a B-A\nb\n", {}, r"train.conll, line 2: the line has 1 columns, but 2 are needed"),
        ("train.conll", b"a O\n\xff O\n", {}, r"line 2: the line is not UTF-8 at byte 1"),
        ("train.conll", "a O\n", {"label": "3"}, r"line 1: the line has 2 columns, but 3 are needed"),
        ("train.conll", "a O\n", {"label": "tag"}, r"data.label = 'tag' is no column of a CoNLL file"),
        ("train.conllu", "1\ta\n", {}, r"line 1: the line has 2 fields between tabs, but CoNLL-U has 10"),
        ("train.conllu", CONLLU.replace("3.1", "x"), {}, r"line 7: the line has the id 'x'"),
        ("train.conllu", CONLLU, {"label": "ner"}, r"data.label = 'ner' does not exist. Choose one of: upos, xpos"),
        ("train.conllu", CONLLU, {"text": "1"}, r"data.text = '1', but the words of CoNLL-U are in a fixed column"),
        ("train.conll", CONLL, {"format": "iob"}, r"data.format = 'iob' does not exist. Choose one of: conll, conllu"),
        ("train.conll", CONLL, {"name": "ner"}, r"data.name = 'ner' does not exist. Choose one of: conll2003, ewt"),
        ("words.txt", CONLL, {}, r"has no file with 'train' in its name"),
        ("train.conll", "\n\n", {}, r"The split 'train' has no examples in .*train.conll"),
        ("train.conll", CONLL, {"train_file": "x"}, r"and single files are both set"),
        ("train.conll", CONLL, {"path": "", "train_file": "x"}, r"x is no file"),
        ("train.conll", CONLL, {"path": "", "validation_file": __file__}, r"leaves nothing to train on"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, changes, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content, name, **changes)


def test_files_of_a_folder_are_known_by_their_names(tmp_path):
    for name, word in (("eng.train", "a"), ("eng.testa", "b"), ("eng.testb", "c"), ("LICENSE", "d")):
        (tmp_path / name).write_text(f"{word} O\n")
    source = sources.load(config_of(path=str(tmp_path)).data)
    assert {split: examples.inputs for split, examples in source.splits.items()} == {
        "train": [["a"]],
        "validation": [["b"]],
        "test": [["c"]],
    }
    (tmp_path / "more.train").write_text("x O\n")
    with pytest.raises(InputError, match=r"has several files for one split, eng.train, more.train"):
        sources.load(config_of(path=str(tmp_path)).data)


def test_the_sentences_of_a_release_are_found_beside_its_plain_text(tmp_path):
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        (tmp_path / f"en_ewt-ud-{name}.conllu").write_text(CONLLU.replace("Ok", split))
        (tmp_path / f"en_ewt-ud-{name}.txt").write_text("It's a test. Ok\n")
    source = sources.load(config_of(path=str(tmp_path)).data)
    assert {split: examples.inputs[1] for split, examples in source.splits.items()} == {
        split: [split] for split in ("train", "validation", "test")
    }
    (tmp_path / "more-train.conllu").write_text(CONLLU)
    with pytest.raises(InputError, match=r"has several files for one split, .*name the files: train=FILE,dev=FILE,test=FILE"):
        sources.load(config_of(path=str(tmp_path)).data)


# Tokens.


@pytest.fixture
def vocab(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "##x", "##y", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return load(tmp_path / "vocab.txt")


def test_pairs_of_bytes_and_of_pieces(vocab):
    ids, mask, _ = encode_pairs(ByteTokenizer(), [("ab", "c"), ("", "")], 6)
    assert ids.tolist() == [[1, 101, 102, 2, 103, 0], [1, 2, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    ids, mask, _ = encode_pairs(vocab, [("ax.", "b c")], 9)
    assert ids.tolist() == [[2, 5, 9, 11, 3, 6, 7, 3, 0]]
    assert mask.sum() == 8


def lengths(a, b, length, tokenizer):
    ids, _, _ = encode_pairs(tokenizer, [(" ".join("a" * a), " ".join("b" * b))], length)
    return (ids == 5).sum(), (ids == 6).sum()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (10, 2, (5, 2)),
        (2, 10, (2, 5)),
        (10, 10, (3, 4)),
        (10, 9, (4, 3)),
        (9, 10, (3, 4)),
        (4, 3, (4, 3)),
        (3, 5, (3, 4)),
        (20, 0, (7, 0)),
    ],
)
def test_the_longer_of_a_pair_is_cut(vocab, a, b, expected):
    assert lengths(a, b, 10, vocab) == expected


def test_a_pair_without_room_is_refused(vocab):
    with pytest.raises(InputError, match=r"data.length = 4, but a pair of texts needs at least 5"):
        encode_pairs(vocab, [("a", "b")], 4)
    with pytest.raises(InputError, match=r"data.length = 2, but words need at least 3"):
        encode_words(vocab, [["a"]], 2)


def test_the_first_token_of_a_word_stands_for_it(vocab):
    ids, mask, word = encode_words(vocab, [["axy", "\u200b", "b.", "c"], ["d"], ["a", "bx"]], 8)
    assert ids.tolist() == [[2, 5, 9, 10, 6, 11, 7, 3], [2, 8, 3, 0, 0, 0, 0, 0], [2, 5, 6, 9, 3, 0, 0, 0]]
    assert word.tolist() == [[-1, 0, -1, -1, 2, -1, 3, -1], [-1, 0] + [-1] * 6, [-1, 0, 1] + [-1] * 5]
    assert mask.sum(-1).tolist() == [8, 3, 5]
    cut, _, word = encode_words(vocab, [["axy", "b.", "c"]], 6)
    assert cut.tolist() == [[2, 5, 9, 10, 6, 3]]
    assert word.tolist() == [[-1, 0, -1, -1, 1, -1]]


def test_words_of_bytes_have_spaces_between_them():
    tokenizer = ByteTokenizer()
    ids, _, word = encode_words(tokenizer, [["ab", "ü", "c"]], 8)
    assert tokenizer.decode(ids[0]) == "ab ü c"
    assert word.tolist() == [[-1, 0, -1, -1, 1, -1, -1, 2]]
    for length in range(2, 8):
        shorter, _, numbers = encode_words(tokenizer, [["ab", "ü", "c"]], length)
        np.testing.assert_array_equal(shorter, ids[:, :length])
        np.testing.assert_array_equal(numbers, word[:, :length])


def test_labels_stand_at_first_tokens_and_gold_is_whole(tmp_path, capsys):
    (tmp_path / "train.conll").write_text("aa X\nb Y\nc X\n\nd Y\n")
    config = config_of(path=str(tmp_path), length=6)
    fmt, splits = pipeline.load(config)
    assert (fmt.inputs, fmt.token_labels, fmt.label_names) == ("words", True, ("X", "Y"))
    assert (
        "train: 1 of 4 words are not read: they lie beyond 6 tokens, or the tokenizer leaves nothing of them.\n"
        in capsys.readouterr().out
    )
    arrays = splits["train"]
    assert arrays["label"].tolist() == [[-100, 0, -100, -100, 1, -100], [-100, 1, -100, -100, -100, -100]]
    assert arrays["gold"].tolist() == [[0, 1, 0], [1, -100, -100]]
    assert arrays["label"].dtype == arrays["gold"].dtype == np.int32
    for batch in (
        next(pipeline.train_iterator(arrays, groups=1, instances=2, seed=0)),
        next(pipeline.eval_batches(arrays, groups=1, instances=2, seed=0))[1],
    ):
        assert set(batch) == {"inputs", "mask", "label", "weight"}
        assert batch["label"].shape == (1, 2, 6)


def test_a_format_of_words_or_pairs_is_saved_and_refuses_other_inputs(tmp_path):
    (tmp_path / "train.conll").write_text("aa B-X\nb O\n")
    fmt, _ = pipeline.load(config_of(path=str(tmp_path)))
    fmt.save(tmp_path)
    assert Format.load(tmp_path) == fmt
    assert fmt.metrics == ("entity_f1", "accuracy")
    for bad in (["a b"], [[]], [["a", 1]], "text"):
        with pytest.raises(InputError, match=r"This model reads a list of lists of words.*\[word, word\]"):
            fmt.encode(bad)
    pairs = Format(("a", "b"), 16, tokenizer=ByteTokenizer(), vocab_size=260, inputs="pair")
    assert set(pairs.encode([("a", "b")])) == {"inputs", "mask"}
    for bad in (["ab"], [("a",)], [("a", None)]):
        with pytest.raises(InputError, match=r"reads a list of pairs of strings"):
            pairs.encode(bad)
