"""Evaluation: predictions of every example, what is measured of them, and what is written."""

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datamux_jax
from datamux_jax import experiment, metrics, predicted, report, scoring, sharding, task_metrics, workdir
from datamux_jax.data import pipeline
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError
from datamux_jax.evaluate import check_ensemble, evaluate, evaluate_run, examples_of
from datamux_jax.losses import NO_LABEL
from datamux_jax.metrics_log import read_lines
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from datamux_jax.train import train
from tests.conftest import small_config, text_config

ROOT = Path(__file__).parents[1]


def telling(params, batch, key):
    """In the place of a network: the number of the example and its slot."""
    numbers = batch["inputs"][..., 0]
    slots = jnp.broadcast_to(jnp.arange(numbers.shape[1]), numbers.shape)
    return {"loss": (batch["weight"].sum(), batch["weight"].sum())}, jnp.stack([numbers, slots], -1)


@pytest.mark.parametrize("every_slot", [False, True])
@pytest.mark.parametrize("examples", [3, 96, 101])
def test_outputs_come_in_the_order_of_the_examples(examples, every_slot):
    config = small_config(3)
    arrays = {"inputs": np.arange(examples)[:, None], "mask": np.ones((examples, 1)), "label": np.zeros(examples)}
    mesh = sharding.inference_mesh()
    scored = scoring.score(telling, None, arrays, config, mesh, seed=1, every_slot=every_slot)
    passes = 3 if every_slot else 1
    assert scored.outputs.shape == (passes, examples, 2)
    np.testing.assert_array_equal(scored.outputs[..., 0], np.broadcast_to(np.arange(examples), (passes, examples)))
    np.testing.assert_array_equal(scored.outputs[..., 1], scored.slots)
    assert scored.totals["loss"][1] == passes * examples
    if every_slot:
        np.testing.assert_array_equal(np.sort(scored.slots, axis=0), np.arange(3)[:, None] + np.zeros(examples))
        once = scoring.score(telling, None, arrays, config, mesh, seed=1)
        np.testing.assert_array_equal(scored.slots[0], once.slots[0])
    other = scoring.score(telling, None, arrays, config, mesh, seed=2, every_slot=every_slot)
    assert examples == 3 or np.any(other.slots != scored.slots)


MESHES = """
import sys
import jax
from datamux_jax import distributed, predicted, scoring, sharding
from datamux_jax.data import pipeline
from datamux_jax.plan import assemble
from tests.conftest import small_config
port, processes, process, out = sys.argv[1:]
if int(processes) > 1:
    distributed.initialize(coordinator=f"localhost:{port}", num_processes=int(processes), process_id=int(process))
config = small_config(3, eval__batch_groups=8, mesh__fsdp=2 if jax.device_count() > 1 else 1)
fmt, splits = pipeline.load(config)
arrays = scoring.first_examples(splits["test"], 100)
plan = assemble(config, fmt, sharding.make_mesh(config, config.batch_groups))
params = jax.jit(lambda key: sharding.unbox(plan.make(key)).params)(jax.random.key(0))
scored = scoring.score(scoring.scoring_step(config, plan.model, None), params, arrays, config, plan.mesh, seed=0, every_slot=True)
import numpy as np
np.savez(out + process, outputs=scored.outputs, slots=scored.slots, devices=jax.device_count())
"""


def start(tmp_path, processes, devices):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MESHES, port, str(processes), str(process), str(tmp_path / f"{processes}-{devices}-")],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, stderr=subprocess.PIPE, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [np.load(tmp_path / f"{processes}-{devices}-{process}.npz") for process in range(processes)]


@pytest.mark.slow
def test_every_process_and_every_mesh_have_the_outputs_of_all_examples(tmp_path):
    (alone,) = start(tmp_path, 1, 1)
    assert alone["outputs"].shape == (3, 100, 10)
    assert np.isfinite(alone["outputs"]).all()
    assert alone["outputs"].std() > 0.01
    for found in start(tmp_path, 2, 4):
        assert found["devices"] == 4
        np.testing.assert_array_equal(found["slots"], alone["slots"])
        np.testing.assert_allclose(found["outputs"], alone["outputs"], atol=1e-5)


def serve(monkeypatch, name, fmt, splits):
    """Gives these data to every config with that `data.name`."""
    for function, given in (("format_of", fmt), ("splits_of", splits)):
        original = getattr(pipeline, function)

        def chosen(config, *args, given=given, original=original):
            return given if config.data.name == name else original(config, *args)

        monkeypatch.setattr(pipeline, function, chosen)


def told(draw):
    """Examples whose features tell of the label, with some noise."""
    found = {}
    for split, count in (("train", 64), ("test", 51)):
        rng = np.random.default_rng(count)
        label, rows = draw(rng, count), rng.normal(size=(count, 4, 3)).astype(np.float32)
        rows[..., 0] += label[:, None]
        found[split] = {"inputs": rows, "mask": np.ones((count, 4), np.int32), "label": label}
    return found


@pytest.fixture(scope="module")
def paraphrases(tmp_path_factory):
    """A run on two classes, scored as MRPC is."""
    folder = tmp_path_factory.mktemp("paraphrases") / "run"
    fmt = Format(("no", "yes"), 4, feature_size=3, inputs="features", metrics=("f1", "accuracy"))
    with pytest.MonkeyPatch.context() as patch:
        serve(patch, "paraphrases", fmt, told(lambda rng, count: rng.integers(0, 2, count).astype(np.int32)))
        config = small_config(2, data__name="paraphrases", steps=30, eval__every=10, optimizer__learning_rate=1e-2)
        config.checkpoint.update({"keep_best": 1, "best": "f1"})
        train(config, folder)
        yield folder


SIMILARITIES = Format((), 4, feature_size=3, inputs="features", metrics=("pearson", "spearman"))


@pytest.fixture
def similarities(monkeypatch):
    """Numbers, scored as STS-B is."""
    splits = told(lambda rng, count: rng.uniform(0, 5, count).astype(np.float32))
    serve(monkeypatch, "similarities", SIMILARITIES, splits)
    return splits


WORDS = 6


@pytest.fixture
def sentences(monkeypatch):
    """Words of one or two tokens, whose first token says the tag; 8 positions, beyond which some words lie."""
    rng, names = np.random.default_rng(0), ("O", "B-PER", "I-PER", "B-LOC")
    fmt = Format(names, 8, vocab_size=20, token_labels=True, inputs="words", metrics=("entity_f1",))

    def split(count):
        arrays = {name: np.zeros((count, 8), np.int32) for name in ("inputs", "mask")}
        arrays |= {"label": np.full((count, 8), NO_LABEL, np.int32), "word": np.full((count, 8), -1, np.int32)}
        arrays["gold"] = np.full((count, WORDS), NO_LABEL, np.int32)
        for row in range(count):
            at = 1
            for word in range(rng.integers(1, WORDS + 1)):
                tag, length = rng.integers(0, len(names)), rng.integers(1, 3)
                arrays["gold"][row, word] = tag
                if at < 8:
                    arrays["inputs"][row, at : at + length] = [4 + tag, 19][: 8 - at][:length]
                    arrays["label"][row, at], arrays["word"][row, at] = tag, word
                at += length
            arrays["mask"][row, :at] = 1
        return arrays

    splits = {"train": split(64), "test": split(51)}
    serve(monkeypatch, "sentences", fmt, splits)
    return splits


def test_the_best_checkpoint_is_that_of_the_task_metric(paraphrases):
    found = {line["step"]: line for line in read_lines(paraphrases) if "eval_f1" in line}
    assert list(found) == [10, 20, 30]
    assert len(found[10]["eval_f1_per_slot"]) == 2
    assert found[load_run(paraphrases).step]["eval_f1"] == max(line["eval_f1"] for line in found.values())


def test_the_metrics_of_classes_are_those_of_the_predictions(paraphrases, tmp_path):
    result = evaluate_run(paraphrases, groupings=1, predictions=tmp_path / "out.tsv")
    assert result == json.loads((paraphrases / "metrics-test-1.json").read_text())
    with (tmp_path / "out.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [int(row["row"]) for row in rows] == list(range(1, 52))
    labels = pipeline.splits_of(load_run(paraphrases).config, None)["test"]["label"]
    assert [row["label"] for row in rows] == [("no", "yes")[label] for label in labels]
    assert {row["prediction"] for row in rows} == {"no", "yes"}
    right = [row["label"] == row["prediction"] for row in rows]
    assert result["accuracy"] == pytest.approx(np.mean(right))
    true, either = (
        sum(all(row[key] == "yes" for key in keys) for row in rows) for keys in (["label", "prediction"], ["label"])
    )
    said = sum(row["prediction"] == "yes" for row in rows)
    assert result["f1"] == pytest.approx(2 * true / (either + said))
    assert result["combined"] == pytest.approx((result["f1"] + result["accuracy"]) / 2)
    assert all(0.5 <= float(row["score"]) <= 1 for row in rows)
    assert result["metrics"] == ["f1", "accuracy"]
    assert result["f1_std"] == 0
    evaluate_run(paraphrases, groupings=1, predictions=tmp_path / "out.jsonl")
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[3])
    assert (line["label"], line["prediction"]) == (rows[3]["label"], rows[3]["prediction"])
    assert line["scores"][line["prediction"]] == pytest.approx(float(rows[3]["score"]))
    assert sum(line["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_mean_and_spread_are_those_of_the_groupings(paraphrases):
    run = load_run(paraphrases)
    step = scoring.scoring_step(run.config, run.model, None)
    arrays = pipeline.splits_of(run.config, run.format)["test"]
    single = []
    for seed in range(3):
        scored = scoring.score(step, run.params, arrays, run.config, run.mesh, seed=seed)
        single.append(predicted.numbers(scored, arrays, run.format, 2))
    result = evaluate(run, split="test", groupings=3)
    f1 = [one["f1"] for one in single]
    assert np.std(f1) > 0
    assert result["f1"] == pytest.approx(np.mean(f1))
    assert result["f1_std"] == pytest.approx(np.std(f1))
    assert result["f1_per_slot"] == pytest.approx(np.mean([one["f1_per_slot"] for one in single], axis=0))
    assert result["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in single]))


def test_in_every_slot_all_examples_count_for_each(paraphrases):
    run = load_run(paraphrases)
    arrays = pipeline.splits_of(run.config, run.format)["test"]
    step = scoring.scoring_step(run.config, run.model, None)
    scored = scoring.score(step, run.params, arrays, run.config, run.mesh, seed=0, every_slot=True)
    numbers = predicted.numbers(scored, arrays, run.format, 2)
    assert numbers["accuracy"] == pytest.approx(np.mean(numbers["accuracy_per_slot"]))
    assert numbers["accuracy_per_slot"] == pytest.approx(metrics.means(scored.totals)["accuracy_per_slot"])
    guesses = np.take_along_axis(scored.outputs.argmax(-1), np.argsort(scored.slots, axis=0), axis=0)
    for slot in range(2):
        assert numbers["f1_per_slot"][slot] == pytest.approx(task_metrics.f1(arrays["label"], guesses[slot]))


def test_the_metrics_of_numbers_are_those_of_the_predictions(similarities, tmp_path, capsys):
    changes = {"data__name": "similarities", "steps": 60, "optimizer__learning_rate": 1e-2, "title": "STS"}
    experiment.run(small_config(2, objective="regression", **changes), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "| Pearson " in shown
    assert "Times 100: Pearson, Spearman, combined." in shown
    assert "lowest and the highest Pearson" in shown
    assert "Pearson by slot:" in shown
    assert "accuracy" not in shown
    result = evaluate_run(tmp_path / "run", groupings=1, predictions=tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    pairs = np.array([[row["label"], row["prediction"]] for row in rows])
    np.testing.assert_allclose(pairs[:, 0], similarities["test"]["label"], atol=1e-5)
    assert result["pearson"] == pytest.approx(np.corrcoef(pairs.T)[0, 1], abs=1e-5)
    assert result["pearson"] > 0.3
    assert result["squared_error"] == pytest.approx(np.mean(np.square(pairs[:, 0] - pairs[:, 1])), rel=1e-4)
    assert result["combined"] == pytest.approx((result["pearson"] + result["spearman"]) / 2)
    evaluate_run(tmp_path / "run", groupings=1, predictions=tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text().startswith("row\tlabel\tprediction\n1\t")


def test_the_metrics_of_tags_count_the_words_that_were_cut_off(sentences, tmp_path):
    config = small_config(
        2, objective="tagging", data__name="sentences", steps=60, eval__every=60, optimizer__learning_rate=1e-2
    )
    config.checkpoint.update({"keep_best": 1, "best": "entity_recall"})
    train(config, tmp_path / "run")
    result = evaluate_run(tmp_path / "run", groupings=1, predictions=tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    names = load_run(tmp_path / "run").format.label_names
    assert [[names.index(tag) for tag in row["label"]] for row in rows] == [
        gold[gold != NO_LABEL].tolist() for gold in sentences["test"]["gold"]
    ]
    assert all(len(row["label"]) == len(row["prediction"]) for row in rows)
    pairs = [pair for row in rows for pair in zip(row["label"], row["prediction"], strict=True)]
    assert result["words_cut"] == sum(guess is None for _, guess in pairs) > 0
    assert result["accuracy"] == pytest.approx(np.mean([label == guess for label, guess in pairs]))
    assert result["accuracy"] > 0.5
    assert result["metrics"] == ["entity_f1"]
    assert "combined" not in result
    assert 0 < result["entity_f1"] < 1
    assert len(result["entity_recall_per_slot"]) == 2
    text = report.markdown({"title": "T", "scores": {"": result}, "throughput": {}}, {"": config})
    assert f"since they lie beyond the length, or the tokenizer leaves nothing of them: {result['words_cut']} words." in text
    evaluate_run(tmp_path / "run", groupings=1, predictions=tmp_path / "out.tsv")
    cut = next(number for number, row in enumerate(rows) if None in row["prediction"])
    line = (tmp_path / "out.tsv").read_text().splitlines()[1 + cut].split("\t")
    assert line[0] == str(1 + cut)
    assert [row["row"] for row in rows] == list(range(1, 52))
    assert line[2].split(" ") == ["-" if tag is None else tag for tag in rows[cut]["prediction"]]


def test_a_slot_without_examples_has_no_number(paraphrases):
    run = load_run(paraphrases)
    with run.config.unlocked():
        run.config.eval.examples = 1
    result = evaluate(run, split="test", groupings=2)
    assert isinstance(result["f1_per_slot"][0], float)
    assert result["f1_per_slot"][1] is None
    text = report.markdown({"title": "T", "scores": {"n2": result}, "throughput": {}}, {"n2": run.config})
    assert "| n2  | 2 |" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.csv", r"neither .tsv nor .jsonl"),
        ("there.tsv", "exists and is not overwritten"),
        ("no/out.tsv", "folder does not exist"),
    ],
)
def test_predictions_that_cannot_be_written_are_refused_before_any_work(digits_run, tmp_path, monkeypatch, name, message):
    (tmp_path / "there.tsv").write_text("precious")
    monkeypatch.setattr(scoring, "score", lambda *args, **kwargs: pytest.fail("scored"))
    with pytest.raises(InputError, match=message):
        experiment.compare(digits_run, predictions=tmp_path / name)
    assert (tmp_path / "there.tsv").read_text() == "precious"


def test_only_a_run_with_a_task_has_predictions(tmp_path):
    config = small_config()
    config.runs = ("n2", "n4")
    (tmp_path / "config.json").write_text(json.dumps(workdir.plain(config)))
    with pytest.raises(InputError, match=r"experiment of several: n2, n4. Give the folder of one"):
        experiment.compare(tmp_path, predictions=tmp_path / "out.tsv")
    (tmp_path / "config.json").write_text(json.dumps(workdir.plain(text_config(objective="retrieval"))))
    with pytest.raises(InputError, match="predicts no labels"):
        experiment.compare(tmp_path, predictions=tmp_path / "out.tsv")


def test_metrics_of_another_kind_are_refused_before_any_work(similarities, monkeypatch, tmp_path):
    serve(monkeypatch, "similarities", dataclasses.replace(SIMILARITIES, metrics=("accuracy",)), similarities)
    with pytest.raises(InputError, match=r"'accuracy' measures classification or tagging, but objective = 'regression'"):
        train(small_config(2, objective="regression", data__name="similarities"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_ensemble_is_that_of_prediction(digits_run, tmp_path):
    """Same groups, same copies: the logits of a full batch are those that a predictor averages."""
    run = load_run(digits_run)
    arrays = examples_of(run, "test", 0)
    step = scoring.scoring_step(run.config, run.model, None, logits=True)
    scored = scoring.score(step, run.params, arrays, run.config, run.mesh, seed=3, ensemble=2)
    order = np.random.default_rng(3).permutation(len(arrays["inputs"]))
    predictor = datamux_jax.load(digits_run)
    whole = len(order) // predictor.batch_size * predictor.batch_size
    assert whole > 0
    expected = predictor.logits(arrays["inputs"][order[:whole]], ensemble=2)
    np.testing.assert_allclose(scored.outputs[0, order[:whole]], expected, atol=1e-5)
    once = scoring.score(step, run.params, arrays, run.config, run.mesh, seed=3)
    assert np.abs(once.outputs[0] - scored.outputs[0]).max() > 1e-3


def test_an_ensemble_does_not_read_every_token_back():
    plan = prepare(text_config(retrieval_loss_coeff=0.1))
    scored = {}
    for logits in (False, True):
        step = scoring.scoring_step(plan.config, plan.model, None, logits=logits)
        key = jax.eval_shape(lambda: jax.random.key(0))
        scored[logits] = set(jax.eval_shape(step, plan.abstract.params, plan.batch_shapes, key)[0])
    assert scored[False] - scored[True] == {"retrieval_loss", "retrieval_accuracy"}


@pytest.mark.parametrize("in_buckets", [False, True])
def test_every_example_is_averaged_with_itself_alone(in_buckets):
    """A network that says its input, and tags that are the input, in rows of one length or cut to one of two."""
    config = small_config(4, eval__batch_groups=3, objective="tagging", data__buckets=in_buckets)
    rng = np.random.default_rng(0)
    mask = (np.arange(20) < rng.integers(5, 21, size=(29, 1))).astype(np.int32)
    labels = rng.integers(0, 5, size=(29, 20)).astype(np.int32) * mask
    arrays = {"inputs": labels, "mask": mask, "label": labels}
    lengths = set()

    def step(params, batch, key):
        lengths.add(batch["inputs"].shape[-1])
        return {}, jax.nn.one_hot(batch["inputs"], 5)

    scored = scoring.score(step, {}, arrays, config, sharding.inference_mesh(), seed=0, ensemble=2)
    assert lengths == ({16, 20} if in_buckets else {20})
    assert scored.outputs.shape == (1, 29, 20)
    np.testing.assert_array_equal(scored.outputs[0], labels)


def test_runs_are_evaluated_as_ensembles(digits_run, capsys, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    scores = experiment.ensembles(tmp_path / "run", 2)
    assert "| run | N | copies | metric   | value" in capsys.readouterr().out
    (found,) = scores.values()
    assert (found["ensemble"], found["metrics"]) == (2, ["accuracy"])
    assert 0 <= found["accuracy"] <= 1
    assert "accuracy_std" in found
    assert not [name for name in found if "per_slot" in name]
    assert workdir.read_json(tmp_path / "run" / "metrics-ensemble-2.json") == found
    with pytest.raises(InputError, match=r"ensemble = 3 copies.*Choose one of: 1, 2"):
        experiment.ensembles(tmp_path / "run", 3)
    with pytest.raises(InputError, match="objective = 'retrieval' has none"):
        check_ensemble(2, small_config(objective="retrieval"))


def test_scores_on_disk_are_those_of_the_same_examples_scored_in_the_same_way(digits_run, capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(digits_run, tmp_path / "run")
    again = "scored before on the same examples: the numbers are those of"
    found = evaluate_run(folder)
    assert again not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", lambda *args, **kwargs: pytest.fail("scored again"))
        assert evaluate_run(folder) == found
    assert f"{again} {folder / 'metrics.json'}" in capsys.readouterr().out

    splits = pipeline.load(load_run(folder).config)[1]
    other = {**splits, "test": {**splits["test"], "label": np.roll(splits["test"]["label"], 1)}}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "splits_of", lambda *args: other)
        changed = evaluate_run(folder)
        assert (changed["accuracy"], changed["fingerprint"]) != (found["accuracy"], found["fingerprint"])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "format_of", lambda *args: (_ for _ in ()).throw(InputError("The data are gone.")))
        with pytest.raises(InputError, match="gone"):
            evaluate_run(folder)
    assert evaluate_run(folder) == found

    config = workdir.read_json(folder / "config.json")
    for key, value in {"every_slot": True, "examples": 50}.items():
        config["eval"][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert evaluate_run(folder) != found
        assert again not in capsys.readouterr().out

    old = {name: value for name, value in evaluate_run(folder).items() if name != "fingerprint"}  # Of an earlier version.
    (folder / "metrics.json").write_text(json.dumps(old | {"accuracy": 2.0}))
    assert evaluate_run(folder)["accuracy"] <= 1


def test_the_baseline_is_fitted_again_on_other_data(monkeypatch, tmp_path):
    fitted = []
    monkeypatch.setitem(experiment.BASELINES, "plain", lambda config, split: fitted.append(split) or {"accuracy": len(fitted)})
    measured = {"baseline": {}}
    config = small_config()
    config.baseline = "plain"
    found = [experiment._baseline(tmp_path, config, {"": config}, measured, "test", data) for data in ("a", "a", "b")]
    assert [one["accuracy"] for one in found] == [1, 1, 2]
