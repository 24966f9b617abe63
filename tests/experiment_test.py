"""Experiments: several runs, one report; and configs."""

import itertools
import json
import shutil
import sys
import types

import ml_collections
import pytest

from configs import common, langid, quickstart
from datamux_jax import benchmark, experiment, optimizer, report
from datamux_jax.config import validate
from datamux_jax.data import tfds_text
from datamux_jax.errors import InputError
from datamux_jax.evaluate import evaluate
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from datamux_jax.train import train
from tests.conftest import small_config, text_config


def two_stages():
    config = text_config(baseline="char_tfidf", title="Small")
    stages = {"warmup": {"objective": "retrieval"}, "n2": {"init_from": "../warmup", "retrieval_loss_coeff": 0.1}}
    common.set_runs(config, stages)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experiment.BASELINES, "char_tfidf", lambda config, split: {"name": "a stand-in", "accuracy": 0.5})
        contents = experiment.run(two_stages(), folder)
    return folder, contents


def test_all_runs_are_trained_evaluated_and_compared(finished):
    folder, contents = finished
    assert contents == json.loads((folder / "report.json").read_text())
    assert set(contents["scores"]) == {"warmup", "n2"}
    assert "accuracy" not in contents["scores"]["warmup"]
    assert contents["scores"]["n2"]["examples"] > 3000
    assert len(contents["scores"]["n2"]["accuracy_per_slot"]) == 2
    assert 0 <= contents["scores"]["n2"]["retrieval_accuracy"] <= 1
    assert contents["throughput"]["n2"]["ratio"] == 1.0
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    assert "# Small" in text
    assert "a stand-in" in text


def test_the_same_command_again_trains_and_measures_nothing(finished, monkeypatch):
    folder, contents = finished
    monkeypatch.setattr("datamux_jax.plan.make_step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(experiment, "throughput", lambda *args, **kwargs: pytest.fail("measured again"))
    assert experiment.run(two_stages(), folder) == contents


def test_an_interrupted_experiment_goes_on(finished, tmp_path, monkeypatch):
    folder, contents = finished
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "n2")
    (tmp_path / "again" / "measured.json").unlink()
    monkeypatch.setitem(experiment.BASELINES, "char_tfidf", lambda config, split: {"name": "a stand-in", "accuracy": 0.5})
    assert experiment.run(two_stages(), tmp_path / "again")["scores"] == contents["scores"]


def test_loading_an_experiment_names_its_runs(finished):
    with pytest.raises(InputError, match=r"several runs. Name one of them: .*warmup, .*n2"):
        load_run(finished[0])


def test_flags_beat_overrides():
    config = quickstart.get_config("n=2+4")
    config.mux.norm = 3.0
    with config.unlocked():
        config.overrides.n2.mux.norm = 5.0
    runs = experiment.expand(config)
    assert {name: run.num_instances for name, run in runs.items()} == {"n2": 2, "n4": 4}
    assert (runs["n2"].mux.norm, runs["n4"].mux.norm) == (5.0, 3.0)
    assert experiment.expand(config, {"mux.norm": 3.0})["n2"].mux.norm == 3.0


@pytest.mark.parametrize("names", [("a/b",), ("",), ("checkpoints",)])
def test_wrong_names_of_runs_are_refused(names):
    config = common.get_config()
    config.runs = names
    with pytest.raises(InputError, match="is no name of a run"):
        experiment.expand(config)


def test_overrides_of_no_run_are_refused():
    config = quickstart.get_config("n=2+4")
    config.runs = ("n2",)
    with pytest.raises(InputError, match="'n4' is no name of a run, or only overrides name it"):
        experiment.expand(config)


def test_an_experiment_without_runs_is_refused():
    with pytest.raises(InputError, match="leave no run to do"):
        langid.get_config("n=,retrieval=")


def test_a_baseline_without_texts_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"reads texts, but data.source = 'digits' has none"):
        experiment.run(small_config(baseline="char_tfidf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["speed", "mux.speed", "steps.speed", "mux"])
def test_unknown_overrides_are_refused(key):
    config = common.get_config()
    change = {key: 1}
    for part in reversed(key.split(".")[:-1]):
        change = {part: {key.split(".")[-1]: 1}}
    common.set_runs(config, {"n2": change})
    with pytest.raises(InputError, match=r"overrides.n2 sets '?[\w.]+'?"):
        experiment.expand(config)


def test_config_arguments_are_typed():
    assert common.parse_arg("n=1+2,steps=5", n=(8,), steps=1, name="a") == ml_collections.ConfigDict(
        {"n": (1, 2), "steps": 5, "name": "a"}
    )
    with pytest.raises(
        InputError, match=r"'m=3' does not exist, or has no value. Known arguments, with their defaults: n=1\+2"
    ):
        common.parse_arg("m=3", n=(1, 2))
    with pytest.raises(InputError, match=r"n='two' cannot be read. Write it like its default, n=1\+2"):
        common.parse_arg("n=two", n=(1, 2))


@pytest.mark.parametrize("config", [common, quickstart, langid])
def test_every_config_is_valid(config):
    for run in experiment.expand(config.get_config()).values():
        validate(run)


def test_every_key_is_read_by_the_library(finished, tmp_path, monkeypatch):
    """A key that nothing reads would be a promise that nobody keeps. Checking a value is not reading it."""
    read = set()

    def watching(original):
        def get(self, key):
            reader = sys._getframe(1).f_globals["__name__"]
            if reader.startswith("datamux_jax.") and reader not in ("datamux_jax.config", "datamux_jax.workdir"):
                read.add(key)
            return original(self, key)

        return get

    for method in ("__getattr__", "__getitem__"):
        monkeypatch.setattr(ml_collections.ConfigDict, method, watching(getattr(ml_collections.ConfigDict, method)))
    monkeypatch.setitem(experiment.BASELINES, "char_tfidf", lambda config, split: {"name": "a stand-in", "accuracy": 0.5})
    experiment.run(two_stages(), tmp_path / "watched")
    # Traced, not run: what pre-training reads, it reads then.
    assert prepare(text_config(objective="electra", generator__kind="plain"), tmp_path / "pre-trained").model_flops() > 0
    learning = text_config(objective="states", distill__teacher="nobody", model__num_layers=2)
    assert prepare(learning, tmp_path / "learning").model_flops() > 0
    train(text_config(distill__teacher=str(tmp_path / "watched/n2"), steps=2), tmp_path / "taught")
    (tmp_path / "book.txt").write_text(
        "\n\n".join(f"The {number}th paragraph of a book, which is short." for number in range(400))
    )
    monkeypatch.setenv("DATAMUX_CACHE", str(tmp_path / "cache"))
    running = {"data__path": str(tmp_path / "book.txt"), "data__tokenizer": "wordpiece", "data__vocab_size": 60}
    kept = {"checkpoint__keep_best": 1, "eval__every": 3, "eval__split": "validation", "data__validation_share": 0.1}
    train(text_config(objective="retrieval", data__source="files", **running, **kept), tmp_path / "files")
    optimizer.make(text_config(optimizer__update_rule="sgd"))
    with pytest.raises(InputError, match=r"data\.text_key"):
        tfds_text._check_feature(
            text_config(data__name="wiki", data__text_key="body").data, types.SimpleNamespace(features={}, full_name="wiki")
        )

    def leaves(node):
        for key in node:
            yield key
            if isinstance(node[key], dict):
                yield from leaves(node[key])

    assert set(leaves(common.get_config().to_dict())) - read == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_instances": 0}, "num_instances = 0 is not positive"),
        ({"num_instances": -2}, "num_instances = -2 is not positive"),
        ({"mux__name": "hadamar"}, "mux.name = 'hadamar' does not exist. Choose one of: binary_hadamard, contextual"),
        ({"mux__name": "none"}, r"mux.name = 'none' goes with demux.name = 'none'"),
        ({"mux__name": "none", "demux__name": "none"}, "plain network for one instance, but num_instances = 2"),
        ({"model__num_heads": 3}, "not divisible by model.num_heads = 3"),
        ({"model__dropout_rate": 1.0}, "not between 0 and 1"),
        ({"optimizer__b1": 2.0}, "not between 0 and 1"),
        ({"seed": 2**32}, "does not fit into 32 bits"),
        ({"retrieval_percentage": 0.0}, "not positive"),
        ({"optimizer__learning_rate": float("inf")}, "not positive and finite"),
        ({"optimizer__warmup_steps": 7}, "more than steps = 6"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate = -1.0 is not positive"),
        ({"retrieval_percentage": 1.5}, "is a share"),
        ({"dtype": "float16"}, "Choose one of: bfloat16, float32"),
        ({"task_loss_coeff": 0.0}, "no task to learn"),
        ({"attention": "flash"}, "attention = 'flash' does not exist. Choose one of: cudnn, xla"),
        ({"attention": "cudnn"}, "attention = 'cudnn' computes in bfloat16, but dtype = 'float32'"),
        (
            {"attention": "cudnn", "dtype": "bfloat16", "model__attention_dropout_rate": 0.1},
            "attention_dropout_rate = 0.1. Set it",
        ),
        ({"attention": "cudnn", "dtype": "bfloat16", "model__num_heads": 4}, "model.num_heads = 4 make them 4"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        validate(small_config(2, **changes))


def test_without_a_gpu_nothing_is_trained_with_cudnn(tmp_path):
    with pytest.raises(InputError, match="attention = 'cudnn' trains on NVIDIA GPUs, but JAX runs on cpu here"):
        train(small_config(2, attention="cudnn", dtype="bfloat16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluation_in_every_slot_scores_each_example_in_each(digits_run):
    run = load_run(digits_run)
    once = evaluate(run, split="test", groupings=3)
    with run.config.unlocked():
        run.config.eval.every_slot = True
    everywhere = evaluate(run, split="test", groupings=3)
    assert once["examples"] == everywhere["examples"]
    # Whole numbers of examples: each slot sees all examples of all groupings.
    for value in everywhere["accuracy_per_slot"]:
        assert value * 3 * everywhere["examples"] == pytest.approx(round(value * 3 * everywhere["examples"]))
    assert everywhere["accuracy"] == pytest.approx(sum(everywhere["accuracy_per_slot"]) / 2)


def test_unknown_splits_are_refused(digits_run):
    with pytest.raises(InputError, match=r"The split 'dev' does not exist. Choose one of: test, train"):
        evaluate(load_run(digits_run), split="dev", groupings=1)


def test_throughput_is_the_median_of_interleaved_windows(monkeypatch):
    """On a clock that calls move on: one takes 4 ms, the other 1 ms, and one window in five is disturbed."""
    now, order = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds * (50 if len(order) == 100 else 1)

        return call

    calls = {"slow": taking("slow", 0.004), "fast": taking("fast", 0.001)}
    result = benchmark.measure(calls, {"slow": 10, "fast": 20}, windows=5, seconds=0.02)
    assert result["slow"]["instances_per_second"] == pytest.approx(2500)
    assert result["fast"]["instances_per_second"] == pytest.approx(20000)
    assert result["fast"]["ratio"] == pytest.approx(8)
    windows = [name for name, _ in itertools.groupby(order[-5 * (5 + 20) :])]
    assert windows == ["slow", "fast"] * 5


def test_the_table_shows_what_was_measured_and_nothing_else():
    score = {
        "num_instances": 2, "accuracy": 0.97, "accuracy_std": 0.001, "accuracy_per_slot": [0.96, 0.98],
        "examples": 360, "split": "test", "groupings": 5, "every_slot": False, "metrics": ["accuracy"],
    }  # fmt: skip
    config = small_config()
    text = report.markdown({"title": "T", "scores": {"n2": score}, "throughput": {}}, {"n2": config})
    assert "| n2  | 2 | 97.0% ± 0.1 | 96.0% to 98.0% |" in text
    assert "instances/s" not in text
    assert "retrieval" not in text
