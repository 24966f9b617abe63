"""Sources, tokenizers and batches."""

import collections
import itertools

import grain
import ml_collections
import numpy as np
import pytest

from datamux_jax import workdir
from datamux_jax.data import buckets, builtin, pipeline
from datamux_jax.data.examples import hash_fraction
from datamux_jax.data.tokenizers import ByteTokenizer
from datamux_jax.errors import InputError
from tests.conftest import small_config, text_config


def test_digits_are_whole_and_split_four_to_one():
    source = builtin.digits()
    train, test = source.split("train"), source.split("test")
    assert len(train) + len(test) == 1797
    assert 0.18 < len(test) / 1797 < 0.22
    assert train.inputs.shape[1:] == (8, 8)
    assert train.inputs.min() == 0
    assert train.inputs.max() == 1
    assert set(test.labels) == set(range(10))


def test_phrases_follow_the_rules():
    source = builtin.cldr()
    texts = [text for examples in source.splits.values() for text in examples.inputs]
    labels = np.concatenate([examples.labels for examples in source.splits.values()])
    assert 30_000 < len(texts) < 45_000
    assert len({text.casefold() for text in texts}) == len(texts)
    assert all(len(text) >= 4 and text == text.strip() and "{" not in text for text in texts)
    assert all(any(map(str.isalpha, text)) for text in texts)
    assert set(labels) == set(range(30))
    shares = {name: len(examples) / len(texts) for name, examples in source.splits.items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)
    by_text = dict(zip(texts, labels, strict=True))
    assert source.label_names[by_text["Schwedisch"]] == "de"


def test_splits_depend_on_the_key_alone():
    assert hash_fraction("digits/0") == pytest.approx(0.254579874698187, abs=1e-12)


def test_bytes_go_there_and_back():
    tokenizer = ByteTokenizer()
    ids, mask, _ = tokenizer.encode(["naïve", "", "ﷺ" * 20], 8)
    assert ids.shape == mask.shape == (3, 8)
    assert tokenizer.decode(ids[0]) == "naïve"
    assert mask.sum(-1).tolist() == [7, 1, 8]
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert (ids[mask == 0] == tokenizer.pad_id).all()
    assert ids.max() < tokenizer.vocab_size


@pytest.fixture
def arrays():
    return {"inputs": np.arange(10)[:, None].repeat(3, 1), "mask": np.ones((10, 3), np.int32), "label": np.arange(10)}


def take(arrays, steps, **kwargs):
    settings = {"groups": 2, "instances": 3, "seed": 0} | kwargs
    return list(itertools.islice(pipeline.train_iterator(arrays, **settings), steps))


def test_every_epoch_has_every_example_once_in_a_new_order(arrays):
    seen = np.concatenate([batch["label"].ravel() for batch in take(arrays, 5)])
    epochs = seen.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_depend_on_the_seed_alone(arrays):
    first, second, other = take(arrays, 3), take(arrays, 3), take(arrays, 3, seed=1)
    assert all(np.array_equal(a["label"], b["label"]) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a["label"], b["label"]) for a, b in zip(first, other, strict=True))


def test_hosts_share_a_batch_without_overlap(arrays):
    whole = take(arrays, 3)
    halves = [take(arrays, 3, mine=np.array([host])) for host in range(2)]
    for step in range(3):
        joined = np.concatenate([halves[host][step]["label"] for host in range(2)])
        np.testing.assert_array_equal(joined, whole[step]["label"])


def test_a_restored_iterator_goes_on_where_it_was(arrays):
    iterator = pipeline.train_iterator(arrays, groups=2, instances=3, seed=0)
    for _ in range(2):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["label"] for _ in range(3)]
    restored = pipeline.train_iterator(arrays, groups=2, instances=3, seed=0)
    assert isinstance(restored, grain.DatasetIterator)
    restored.set_state(state)
    np.testing.assert_array_equal([next(restored)["label"] for _ in range(3)], expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_evaluation_scores_every_example_exactly_once(arrays, shuffle):
    batches = list(pipeline.eval_batches(arrays, groups=2, instances=4, seed=0, shuffle=shuffle))
    counted = collections.Counter()
    for rows, batch in batches:
        assert batch["label"].shape == (2, 4)
        np.testing.assert_array_equal(batch["label"], rows)
        counted.update(rows[batch["weight"] > 0].tolist())
    assert counted == dict.fromkeys(range(10), 1)
    if not shuffle:
        assert batches[0][0].ravel().tolist() == list(range(8))


def test_groupings_differ(arrays):
    first, second = (next(pipeline.eval_batches(arrays, groups=3, instances=3, seed=s))[0] for s in (0, 1))
    assert not np.array_equal(first, second)


def test_formats_of_both_sources():
    fmt, splits = pipeline.load(small_config())
    assert (fmt.input_shape, fmt.vocab_size, len(fmt.label_names)) == ((8, 8), 0, 10)
    assert splits["test"]["inputs"].dtype == np.float32
    fmt, splits = pipeline.load(text_config())
    assert (fmt.input_shape, fmt.vocab_size, len(fmt.label_names)) == ((12,), 260, 30)
    assert splits["test"]["inputs"].dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "imagenet"}, r"data.source = 'imagenet' does not exist. Choose one of: cldr, digits"),
        ({"data__source": "cldr"}, r"data.length = 0.*at least 2"),
        ({"data__length": 9}, r"data.length = 9.*length 8"),
        ({"data__source": "cldr", "data__length": 9, "data__tokenizer": "words"}, r"'words' does not exist.*bytes"),
    ],
)
def test_wrong_data_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        pipeline.load(small_config(**changes))


@pytest.mark.parametrize(
    "bad", [[["a"]], np.zeros((2, 8)), np.zeros((2, 4, 8)), np.zeros(()), None, [None], np.full((1, 8, 8), np.nan)]
)
def test_wrong_features_are_refused(bad):
    fmt, _ = pipeline.load(small_config())
    with pytest.raises(InputError, match=r"shape|NaN"):
        fmt.encode(bad)


def test_wrong_texts_are_refused():
    fmt, _ = pipeline.load(text_config())
    with pytest.raises(InputError, match=r"an entry is 3 of type int"):
        fmt.encode(["a", 3])


@pytest.fixture
def texts():
    """100 texts of 2 to 40 tokens; each token is the number of its text."""
    sizes = np.random.default_rng(0).integers(2, 41, 100)
    mask = (np.arange(40) < sizes[:, None]).astype(np.int32)
    number = np.arange(100)
    return {
        "inputs": number[:, None] * mask,
        "mask": mask,
        "label": number[:, None].repeat(40, 1),
        "teacher": np.zeros((100, 40, 3), np.float16),
    }


def with_buckets(prefix=0):
    """A config with length buckets; with `prefix`, an index prefix in place of so many of the last tokens."""
    return text_config(max(prefix - 1, 2), data__buckets=True, demux__name="index" if prefix else "rsa", demux__prefix="cut")


def test_texts_of_similar_length_share_batches_which_are_cut(texts):
    found = buckets.of(with_buckets(), texts)
    assert found.lengths == (16, 32, 40)
    assert buckets.of(text_config(), texts) is None
    earlier = workdir.plain(text_config())
    del earlier["data"]["buckets"]  # A run of an earlier version.
    assert buckets.of(ml_collections.ConfigDict(earlier), texts) is None
    # A window is one epoch here: 16 batches of 6.
    batches = take(texts, 160, buckets=found)
    assert {batch["mask"].shape[-1] for batch in batches} == {16, 32, 40}
    for batch in batches:
        length = batch["mask"].shape[-1]
        assert {name: x.shape[2] for name, x in batch.items() if x.ndim > 2} == dict.fromkeys(
            ("inputs", "mask", "label", "teacher"), length
        )
        numbers = batch["label"][..., 0]
        np.testing.assert_array_equal(batch["mask"].sum(-1), texts["mask"][numbers].sum(-1))  # Nothing is lost,
        assert batch["mask"].sum(-1).max() > {16: 0, 32: 16, 40: 32}[length]  # and no row is longer than it must be.
    # What windows hold is what as many batches without buckets hold, and no text stands there twice but at the seam of epochs.
    plain = take(texts, 160)
    for start in range(0, 160, 16):
        held = [
            collections.Counter(np.concatenate([b["label"][..., 0].ravel() for b in one[start : start + 16]]))
            for one in (batches, plain)
        ]
        assert held[0] == held[1]
    assert sum(len(set(batch["label"][..., 0].ravel())) < 6 for batch in batches) <= 10
    # Lengths in the order of their batches are no blocks.
    first = [batch["mask"].shape[-1] for batch in batches[:16]]
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_only_lengths_that_some_text_fits_are_compiled_for(texts):
    short = {name: x[texts["mask"].sum(-1) <= 16] for name, x in texts.items()}
    assert buckets.of(with_buckets(), short).lengths == (16,)


def test_hosts_cut_a_batch_alike(texts):
    found = buckets.of(with_buckets(), texts)
    whole = take(texts, 400, buckets=found)
    halves = [take(texts, 400, mine=np.array([host]), buckets=found) for host in range(2)]
    differ = 0
    for step in range(400):
        joined = np.concatenate([halves[host][step]["inputs"] for host in range(2)])
        np.testing.assert_array_equal(joined, whole[step]["inputs"])
        differ += len({int(found.numbers[halves[host][step]["label"][..., 0]].max()) for host in range(2)}) > 1
    assert differ > 5  # Hosts whose own texts fit another length.


def test_rows_have_room_for_a_prefix_that_takes_the_last_tokens(texts):
    for batch in take(texts, 64, buckets=buckets.of(with_buckets(prefix=4), texts)):
        room = batch["mask"].shape[-1] - 4
        numbers = batch["label"][..., 0]
        assert (texts["mask"][numbers].sum(-1) <= max(room, 40 * (room == 36))).all()


def test_evaluation_in_buckets_scores_every_example_exactly_once_among_its_like(texts):
    found = buckets.of(with_buckets(), texts)
    counted = collections.Counter()
    lengths = []
    for rows, batch in pipeline.eval_batches(texts, groups=2, instances=4, seed=0, buckets=found):
        lengths.append(batch["mask"].shape[-1])
        np.testing.assert_array_equal(batch["label"][..., 0], rows)
        np.testing.assert_array_equal(batch["mask"].sum(-1), texts["mask"][rows].sum(-1))
        counted.update(rows[batch["weight"] > 0].tolist())
    assert counted == dict.fromkeys(range(100), 1)
    assert set(lengths) == {16, 32, 40}
    first, second = (
        next(pipeline.eval_batches(texts, groups=2, instances=4, seed=seed, buckets=found))[0] for seed in range(2)
    )
    assert not np.array_equal(first, second)
