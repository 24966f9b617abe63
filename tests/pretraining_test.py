"""From raw text to a fine-tuned task: stages, packing, tokenizers that travel with runs."""

import itertools
import json

import chex
import numpy as np
import pytest

from configs import langid, muxbert, muxelectra, retrieval
from datamux_jax import experiment
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError
from datamux_jax.runs import load_run
from datamux_jax.train import train

WORDS = ["".join(pair) + end for pair in itertools.product("bdfglmnprst", "aeiou") for end in ("", "n", "sh")]
TINY = {
    "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2, "model.mlp_dim": 32, "batch_groups": 8,
    "log_every": 2, "eval.examples": 40, "eval.batch_groups": 8, "generator.hidden_size": 16, "generator.num_heads": 2,
    "generator.mlp_dim": 32, "generator.num_layers": 1, "generator.embedding_size": 16, "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two files of sentences, about 6,000 words."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    for name in ("one.txt", "two.txt"):
        paragraphs = [" ".join(rng.choice(WORDS, 30)) + "." for _ in range(100)]
        (folder / name).write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DATAMUX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def tiny(config):
    config.update_from_flattened_dict(TINY)
    return config, TINY


def test_three_stages_from_raw_text_to_a_task(books, tmp_path, capsys):
    """Retrieval and MLM in turn, in one command; then classification of other texts with the same tokenizer."""
    argument = f"n=2,files={books},vocab=200,length=16,retrieval=6,steps=6"
    config, flags = tiny(muxbert.get_config(argument))
    report = experiment.run(config, tmp_path / "pre", flags)
    assert set(report["scores"]) == {"n2-retrieval", "n2"}
    assert "n2: starts from ../n2-retrieval\n" in capsys.readouterr().out, "and nothing stays fresh"
    assert report["scores"]["n2"]["mlm_loss"] > 0
    assert report["scores"]["n2-retrieval"]["retrieval_accuracy"] >= 0
    line = json.loads((tmp_path / "pre" / "n2" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"mlm_loss", "tokens_per_second", "data_wait_share", "gradient_norm", "learning_rate"} <= set(line)
    assert line["tokens_per_second"] == pytest.approx(16 * line["instances_per_second"])

    fine = langid.get_config("n=2,retrieval=,warmup=0,finetune=4")
    runs = experiment.expand(fine, {})
    one = runs["n2"]
    model = load_run(tmp_path / "pre" / "n2").config.model
    one.model.update(model.to_dict())
    one.update_from_flattened_dict(
        {"init_from": str(tmp_path / "pre" / "n2"), "data.tokenizer": str(tmp_path / "pre" / "n2"), "data.length": 16,
         "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-30, "batch_groups": 8,
         "mux.attend_padding": True}
    )  # fmt: skip
    train(one, tmp_path / "fine")
    tuned, pretrained = load_run(tmp_path / "fine"), load_run(tmp_path / "pre" / "n2")
    assert tuned.format.tokenizer == pretrained.format.tokenizer
    assert tuned.format.vocab_size == pretrained.format.vocab_size == 200
    for part in ("embeddings", "mux", "backbone", "demux"):
        chex.assert_trees_all_close(tuned.params[part], pretrained.params[part], atol=1e-12)


@pytest.mark.slow
def test_a_stage_alone_is_taken_over_by_all_in_turn(books, tmp_path):
    argument = f"n=2,files={books},tokenizer=bytes,length=16,retrieval=4,steps=4"
    config, _ = tiny(muxbert.get_config(argument))
    runs = experiment.expand(config, TINY)
    train(runs["n2-retrieval"], tmp_path / "n2-retrieval")
    only, _ = tiny(muxbert.get_config(argument + ",stage=pretraining"))
    assert list(experiment.expand(only, TINY)) == ["n2"]
    train(experiment.expand(only, TINY)["n2"], tmp_path / "n2")
    assert load_run(tmp_path / "n2").step == 4


@pytest.mark.parametrize("generator", ["uniform", "plain", "muxed"])
@pytest.mark.slow
def test_electra_pre_training_runs_for_every_generator_and_the_plain_network(books, tmp_path, generator):
    argument = f"n=1+2,files={books},tokenizer=bytes,length=16,retrieval=2,steps=2,generator={generator}"
    config, flags = tiny(muxelectra.get_config(argument))
    report = experiment.run(config, tmp_path, flags)
    assert set(report["scores"]) == {"n1", "n2-retrieval", "n2"}
    assert report["scores"]["n2"]["replaced_accuracy"] > 0
    assert ("generator_mlm_loss" in report["scores"]["n2"]) == (generator != "uniform")


@pytest.mark.slow
def test_retrieval_warm_up_of_datamux(books, tmp_path):
    config, flags = tiny(retrieval.get_config(f"n=2,files={books},tokenizer=bytes,length=16,steps=2"))
    report = experiment.run(config, tmp_path, flags)
    assert report["scores"]["n2"]["retrieval_accuracy"] >= 0
    assert load_run(tmp_path / "n2").config.mux.norm == 20


def test_chunks_are_full_and_every_epoch_has_each_once_in_new_groups(books):
    config, _ = tiny(muxbert.get_config(f"n=2,files={books},tokenizer=bytes,length=32,retrieval=0,steps=2"))
    fmt, splits = pipeline.load(experiment.expand(config, TINY)["n2"])
    rows = len(splits["train"]["inputs"])
    data = pipeline.train_iterator(splits["train"], groups=4, instances=2, seed=0)
    batches = list(itertools.islice(data, 2 * (rows // 8)))
    assert all(batch["inputs"].dtype == np.int32 and batch["mask"].all() for batch in batches)
    groups = [tuple(map(bytes, group.astype(np.uint8))) for batch in batches for group in batch["inputs"]]
    first, second = groups[: rows // 2], groups[rows // 2 :]
    assert len({chunk for group in first for chunk in group}) == len(
        set(map(bytes, splits["train"]["inputs"].astype(np.uint8)))
    )
    assert len(set(first) & set(second)) < 0.1 * len(first)
    text = fmt.tokenizer.decode(splits["train"]["inputs"].ravel()[:400])
    assert text.split(".")[0] in (books / "one.txt").read_text()


def test_changed_text_is_not_mistaken_for_the_same(books, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text((books / "one.txt").read_text())
    config, _ = tiny(muxbert.get_config(f"n=2,files={folder},tokenizer=bytes,length=16,retrieval=0,steps=2"))
    one = experiment.expand(config, TINY)["n2"]
    train(one, tmp_path / "run")
    (folder / "a.txt").write_text((books / "two.txt").read_text())
    with pytest.raises(InputError, match=r"was trained on data that are encoded differently"):
        train(one, tmp_path / "run")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("n=2", r"pre-training reads one of them"),
        ("²x64,files=x", r"size '²x64' does not exist"),
        ("huge,files=x", r"size 'huge' does not exist. Choose one of small, base, large, or LAYERSxWIDTH"),
        ("4x100,files=x", r"multiple of 64"),
        ("n=2,files=x,stage=mlm", r"stage='mlm' does not exist"),
        ("n=2,files=x,epochs=3", r"'epochs=3' does not exist"),
    ],
)
def test_wrong_arguments_are_refused(argument, message):
    with pytest.raises(InputError, match=message):
        muxbert.get_config(argument)


def test_running_text_has_no_labels(books, tmp_path):
    config, _ = tiny(muxbert.get_config(f"n=2,files={books},tokenizer=bytes,length=16,retrieval=0,steps=2"))
    one = experiment.expand(config, TINY)["n2"]
    one.objective = "classification"
    with pytest.raises(InputError, match=r"objective = 'classification' needs labels.*running text"):
        train(one, tmp_path / "run")
