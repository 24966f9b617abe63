"""Learning from a teacher: the loss, the teacher's outputs in the run's folder, restarts, and teachers that do not fit."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from configs import common, glue, tagging
from datamux_jax import distill, experiment, losses, sharding, workdir
from datamux_jax.config import validate
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from datamux_jax.step import born_sharded, make_step
from datamux_jax.train import train
from tests.conftest import small_config, text_config
from tests.train_test import lines, params_of, stopped

B, N, L, C = 3, 2, 5, 4


def kl(teacher, student, temperature):
    """`T^2 KL(teacher || student)`, written out."""
    p, q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) * 3 for shape in shapes]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_of_classes_is_that_of_hinton(temperature):
    student, teacher = drawn((B, N, C), (B, N, C))
    weight = np.array([[1, 1], [1, 0], [1, 1]], np.float32)
    batch = {"teacher": jnp.asarray(teacher), "weight": jnp.asarray(weight)}
    total, count = losses.distillation_loss(jnp.asarray(student), batch, temperature)["distill_loss"]
    np.testing.assert_allclose(total, (kl(teacher, student, temperature) * weight).sum(), rtol=1e-5)
    assert count == 5
    same = losses.distillation_loss(batch["teacher"], batch, temperature)["distill_loss"][0]
    assert abs(same) < 1e-5


def test_gradients_keep_their_size_whatever_the_temperature():
    """At a high temperature they are those of the squared distance of the centred logits, over C (Hinton et al. 2015, section 2.1)."""
    student, teacher = drawn((B, N, C), (B, N, C))
    batch = {"teacher": jnp.asarray(teacher), "weight": jnp.ones((B, N))}
    gradient = jax.grad(lambda x: losses.distillation_loss(x, batch, 1000.0)["distill_loss"][0])(jnp.asarray(student))
    difference = student - teacher
    np.testing.assert_allclose(gradient, (difference - difference.mean(-1, keepdims=True)) / C, atol=0.02)


def test_the_loss_of_numbers_and_of_tags():
    student, teacher, tags, wanted = drawn((B, N), (B, N), (B, N, L - 1, C), (B, N, L, C))
    weight = np.ones((B, N), np.float32)
    weight[0, 1] = 0
    batch = {"teacher": jnp.asarray(teacher), "weight": jnp.asarray(weight)}
    total, count = losses.distillation_loss(jnp.asarray(student), batch, 2.0)["distill_loss"]
    np.testing.assert_allclose(total / count, ((student - teacher) ** 2)[weight > 0].mean(), rtol=1e-5)
    label = np.random.default_rng(1).choice([-100, 0, 1], size=(B, N, L)).astype(np.int32)
    half = wanted.astype(np.float16)
    batch = {"teacher": jnp.asarray(half), "weight": jnp.asarray(weight), "label": jnp.asarray(label)}
    total, count = losses.distillation_loss(jnp.asarray(tags), batch, 2.0)["distill_loss"]
    asked = (label[..., : L - 1] != -100) & (weight[..., None] > 0)
    assert count == asked.sum()
    np.testing.assert_allclose(total, kl(half[:, :, : L - 1].astype(np.float32), tags, 2.0)[asked].sum(), rtol=1e-5)


@pytest.fixture(scope="session")
def digits_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "n1"
    train(small_config(1, steps=60, optimizer__learning_rate=3e-3), folder)
    return folder


def taught(teacher, make=small_config, **changes):
    return make(distill__teacher=str(teacher), **changes)


def test_the_objective_is_the_weighted_sum_of_labels_and_teacher(digits_teacher, tmp_path):
    config = taught(digits_teacher, distill__weight=0.3, distill__temperature=4.0, task_loss_coeff=0.9, log_every=1, steps=3)
    train(config, tmp_path)
    for line in lines(tmp_path):
        assert line["loss"] == pytest.approx(0.9 * (0.7 * line["task_loss"] + 0.3 * line["distill_loss"]), rel=1e-5)


def test_outputs_are_the_teachers_for_every_example_in_order(digits_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 100)  # Several, and a ragged one.
    plan = prepare(taught(digits_teacher), tmp_path)
    outputs = distill.teacher_arrays(plan, tmp_path)["teacher"]
    run = load_run(digits_teacher)
    arrays = plan.arrays
    with sharding.on_mesh(run.mesh):
        out = run.model.apply({"params": run.params}, arrays["inputs"][:, None], arrays["mask"][:, None])
    np.testing.assert_allclose(outputs, np.asarray(out["logits"])[:, 0], atol=1e-4)
    assert (outputs.argmax(-1) == arrays["label"]).mean() > 0.25, "the teacher has learned something"
    batch = next(pipeline.train_iterator(arrays | {"teacher": outputs}, groups=8, instances=2, seed=0))
    assert {name: (x.shape, x.dtype) for name, x in plan.batch_shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    row = int(np.flatnonzero((arrays["inputs"] == batch["inputs"][3, 1]).all((1, 2)))[0])
    np.testing.assert_array_equal(batch["teacher"][3, 1], outputs[row])


def test_interrupted_equals_uninterrupted_also_without_the_teacher(digits_teacher, tmp_path, monkeypatch):
    """A restart goes on with the outputs that were saved, and asks the teacher nothing."""
    shutil.copytree(digits_teacher, tmp_path / "n1")
    config = taught("../n1", steps=9, model__dropout_rate=0.1)
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "parts", 4)
    shutil.rmtree(tmp_path / "n1")
    monkeypatch.setattr(distill, "load_run", lambda path: pytest.fail("asked again"))
    train(config, tmp_path / "parts")
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "parts"))
    assert lines(tmp_path / "whole")[-1]["loss"] == lines(tmp_path / "parts")[-1]["loss"]


@pytest.mark.slow
def test_damaged_outputs_are_made_again_by_the_same_teacher_only(digits_teacher, tmp_path):
    shutil.copytree(digits_teacher, tmp_path / "n1")
    config = taught("../n1", steps=9)
    stopped(config, tmp_path / "n2", 4)
    file = tmp_path / "n2" / distill.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    plan = prepare(config, tmp_path / "n2")
    distill.teacher_arrays(plan, tmp_path / "n2")
    assert file.read_bytes() == whole
    file.unlink()
    shutil.rmtree(tmp_path / "n1")
    train(small_config(1, steps=4), tmp_path / "n1")
    with pytest.raises(InputError, match=r"teacher.npy is damaged or gone.*step 60 then, 4 now"):
        train(config, tmp_path / "n2")


def test_outputs_of_another_teacher_or_other_data_are_not_used(digits_teacher, tmp_path):
    shutil.copytree(digits_teacher, tmp_path / "n1")
    plan = prepare(taught("../n1"), tmp_path / "n2")
    (tmp_path / "n2").mkdir()
    first = np.array(distill.teacher_arrays(plan, tmp_path / "n2")["teacher"])
    shutil.rmtree(tmp_path / "n1")
    train(small_config(1, steps=4), tmp_path / "n1")
    second = np.array(distill.teacher_arrays(plan, tmp_path / "n2")["teacher"])
    assert np.abs(first - second).max() > 0.1
    plan = prepare(taught("../n1"), tmp_path / "n2")
    plan.arrays["inputs"][0] = 1 - plan.arrays["inputs"][0]
    try:
        third = np.array(distill.teacher_arrays(plan, tmp_path / "n2")["teacher"])
    finally:
        plan.arrays["inputs"][0] = 1 - plan.arrays["inputs"][0]
    assert np.abs(second[0] - third[0]).max() > 1e-3
    np.testing.assert_allclose(second[1:], third[1:], atol=1e-5)


@pytest.mark.slow
def test_resume_asks_for_the_same_teacher(digits_teacher, tmp_path):
    shutil.copytree(digits_teacher, tmp_path / "old" / "n1")
    config = taught("../n1", steps=9)
    stopped(config, tmp_path / "old" / "n2", 4)
    train(config, tmp_path / "old" / "n2")
    train(small_config(1, steps=4), tmp_path / "new" / "n1")
    resumed = taught("../n1", steps=12, resume=str(tmp_path / "old" / "n2"))
    with pytest.raises(InputError, match=r"learned from another teacher, or another checkpoint of it"):
        train(resumed, tmp_path / "new" / "n2")
    assert not (tmp_path / "new" / "n2").exists()
    other = taught("../n1", steps=12, resume=str(tmp_path / "old" / "n2"), distill__temperature=3.0)
    with pytest.raises(InputError, match=r"distill.temperature = 2.0 there, 3.0 here"):
        train(other, tmp_path / "old" / "more")
    train(resumed, tmp_path / "old" / "more")


@pytest.mark.slow
def test_micro_batches_make_the_update_of_the_whole_batch(digits_teacher, tmp_path):
    plan = prepare(taught(digits_teacher), tmp_path)
    arrays = plan.arrays | distill.teacher_arrays(plan, tmp_path)
    batch = sharding.put_batch(next(pipeline.train_iterator(arrays, groups=8, instances=2, seed=0)), plan.mesh)
    batch["weight"] = batch["weight"].at[1, 0].set(0.0)
    results = []
    for count in (1, 4):
        state = born_sharded(plan.make, 0, plan.mesh)
        state, sums = make_step(plan.objective, plan.tx, plan.abstract, plan.mesh, count)(state, batch)
        results.append(jax.device_get(sums))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_teacher_may_read_other_tokens(text_run, tmp_path):
    """A longer row and N = 2: its tokens and its length are its own."""
    train(taught(text_run, text_config, steps=2, data__length=9), tmp_path / "run")
    count = len(prepare(text_config()).arrays["label"])
    assert np.load(tmp_path / "run" / distill.FILE).shape == (count, 30)


@pytest.fixture
def folder(tmp_path):
    """Sentences with tags, and pairs of texts with a score."""
    words = ["good", "bad", "fine", "awful", "nice"]
    (tmp_path / "ner").mkdir()
    (tmp_path / "STS-B").mkdir()
    for name in ("train", "dev"):
        (tmp_path / f"ner/{name}.conll").write_text("".join(f"{a} B-X\n{b} O\n\n" for a in words for b in words))
        rows = "".join(f"g\tf\ty\t{i}\t{i / 5}\t{a}\t{words[i % 3]}\n" for i, a in enumerate(words * 5))
        (tmp_path / f"STS-B/sts-{name}.csv").write_text(rows)
    return tmp_path


TINY = "n=2+1,size=1x64,steps=2,warmup=2,groups=2,length=12,distill=0.7"


def test_the_plain_network_comes_first():
    runs = experiment.expand(glue.get_config("rte,n=2+1,distill=0.7"))
    assert list(runs) == ["n1", "n2-warmup", "n2"]
    assert [run.distill.teacher for run in runs.values()] == ["", "", "../n1"]
    assert runs["n2"].distill.weight == 0.7
    for run in runs.values():
        validate(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arg", "shape", "dtype"),
    [
        (glue, "stsb,data={}", (25,), "float32"),
        (tagging, "train={0}/ner/train.conll,dev={0}/ner/dev.conll", (25, 12, 2), "float16"),
    ],
)
def test_the_plain_network_teaches_the_others_in_one_command(folder, config, arg, shape, dtype):
    c = config.get_config(f"{arg.format(folder)},{TINY}")
    c.log_every = 1
    c.eval.groupings = 1
    experiment.run(c, folder / "runs")
    outputs = np.load(folder / "runs/n2" / distill.FILE)
    assert (outputs.shape, str(outputs.dtype)) == (shape, dtype)
    losses_ = [line["distill_loss"] for line in lines(folder / "runs/n2")]
    assert len(losses_) == 2
    assert np.isfinite(losses_).all()
    assert not (folder / "runs/n1" / distill.FILE).exists()


def test_without_the_plain_network_nobody_can_teach():
    with pytest.raises(InputError, match=r"distill=0.5 lets the plain network teach the others, but n=2\+5 has none. Add 1"):
        glue.get_config("rte,n=2+5,distill=0.5")
    runs = experiment.expand(glue.get_config("rte,n=2+1"))
    assert list(runs) == ["n2-warmup", "n2", "n1"]
    assert not any(run.distill.teacher for run in runs.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__weight": 0.0}, r"distill.weight = 0.0 is the teacher's share.*above 0"),
        ({"distill__weight": 1.5}, r"distill.weight = 1.5 .*to 1 at most"),
        ({"distill__temperature": 0.0}, r"distill.temperature = 0.0 is not positive"),
        (
            {"objective": "retrieval", "data__source": "cldr", "data__length": 8},
            r"teaches a task, but objective = 'retrieval' is none",
        ),
    ],
)
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        validate(taught("somewhere", **changes))


def refused(config, run, message):
    with pytest.raises(InputError, match=message):
        train(config, run)
    assert not run.exists(), "nothing was written"


def test_wrong_teachers_are_refused_before_anything_is_written(digits_run, text_run, tmp_path):
    run = tmp_path / "run"
    refused(taught("nowhere"), run, r"distill.teacher = 'nowhere' exists neither in the new run's folder")
    refused(taught(text_run), run, r"learned another task: data.source = 'cldr' there, 'digits' here")
    (tmp_path / "empty").mkdir()
    refused(taught("../empty"), run, r"empty is not the folder of a run")
    train(text_config(objective="retrieval", steps=2), tmp_path / "warmup")
    refused(taught("../warmup", text_config), run, r"objective = 'retrieval' there, 'classification' here")
    shutil.copytree(digits_run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("checkpoints"))
    refused(taught("../unfinished"), run, r"holds no checkpoint yet")
    shutil.copytree(digits_run, tmp_path / "renamed")
    fmt = json.loads((tmp_path / "renamed/format.json").read_text())
    fmt["label_names"][:2] = ["one", "zero"]
    workdir.write_json(tmp_path / "renamed/format.json", fmt)
    refused(taught("../renamed"), run, r"predicts the labels one, zero, .*, but this run the labels 0, 1")
    several = common.get_config()
    common.set_runs(several, {"a": {}, "b": {}})
    (tmp_path / "several").mkdir()
    workdir.write_json(tmp_path / "several/config.json", workdir.plain(several))
    refused(taught("../several"), run, r"is an experiment of several runs.*several/a")


def test_outputs_that_are_too_large_are_refused(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "ROOM", 1000)
    refused(taught(digits_run), tmp_path / "run", r"for 1,\d{3} examples would take .* GiB.*Lower data.length")


@pytest.mark.slow
def test_a_teacher_of_tags_reads_the_same_tokens(folder):
    files = {
        "objective": "tagging", "data__source": "tagging", "data__train_file": str(folder / "ner/train.conll"),
        "data__validation_file": str(folder / "ner/dev.conll"), "eval__split": "validation", "steps": 2,
    }  # fmt: skip
    train(small_config(1, data__length=12, **files), folder / "n1")
    train(taught("../n1", data__length=12, **files), folder / "taught")
    assert np.load(folder / "taught" / distill.FILE).shape == (25, 12, 2)
    assert np.isfinite(lines(folder / "taught")[-1]["distill_loss"])
    refused(taught("../n1", data__length=10, **files), folder / "n2", r"data.length is 12 there and 10 here")
    train(small_config(2, data__length=12, demux__name="index", demux__prefix="cut", **files), folder / "cut")
    refused(taught("../cut", data__length=12, **files), folder / "n2", r"has demux.prefix = 'cut', so the last tokens")


def test_a_teacher_of_another_task_in_the_same_experiment_is_refused_at_once(tmp_path):
    config = text_config()
    common.set_runs(config, {"warmup": {"objective": "retrieval"}, "n2": {"distill": {"teacher": "../warmup"}}})
    with pytest.raises(InputError, match=r"objective = 'retrieval' there, 'classification' here"):
        experiment.run(config, tmp_path / "runs")
    common.set_runs(config, {"n2": {"distill": {"teacher": "../later"}}, "later": {}})
    with pytest.raises(InputError, match=r"distill.teacher = '../later' exists neither"):
        experiment.run(config, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
