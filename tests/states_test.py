"""State distillation: what is learned from whom, a teacher that never changes, restarts, and teachers that do not fit."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, states
from datamux_jax import experiment, flops, leaves, losses, optimizer, workdir
from datamux_jax.analysis.readings import READINGS
from datamux_jax.build import build, build_second, count_params
from datamux_jax.config import validate
from datamux_jax.errors import InputError
from datamux_jax.families import SpecialTokens
from datamux_jax.model import call
from datamux_jax.objectives import OBJECTIVES
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from datamux_jax.train import train
from tests.conftest import fresh_params, text_config
from tests.train_test import lines, params_of, stopped

B, N, L, V = 3, 2, 7, 20
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, mlp_first=1, filler=17, index=19, index_cls=1)
RNGS = {"corruption": jax.random.key(7), "dropout": jax.random.key(8)}


def learning(teacher="nobody", **changes):
    return text_config(
        N, **{"objective": "states", "distill__teacher": str(teacher), "model__num_layers": 2, "model__pool": "mean", **changes}
    )


def make(**changes):
    config = learning(**changes)
    model = build(config, num_classes=0, vocab_size=V, max_length=L, tokens=TOKENS)
    second = build_second(config, model)
    params = fresh_params(model, (1, N, L), "int32", second)
    # Fresh LayerNorms give normalised states; those of a trained teacher are not.
    return config, model, second, {**params, "teacher": jax.tree.map(lambda x: 1.5 * x, params["teacher"])}


@pytest.fixture
def batch():
    mask = jnp.broadcast_to(jnp.arange(L) < jnp.array([L, 4])[:, None], (B, N, L)).astype(jnp.int32)
    tokens = jax.random.randint(jax.random.key(0), (B, N, L), 4, 17) * mask
    return {"inputs": tokens, "mask": mask, "label": jnp.zeros((B, N), int), "weight": jnp.ones((B, N)).at[2, 1].set(0)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a small plain run on phrases."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(text_config(1, model__num_layers=2), folder)
    return folder


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("demux", ["rsa", "index", "mlp"])
def test_the_loss_is_the_squared_error_of_the_plain_networks_states(batch, demux):
    config, model, second, params = make(demux__name=demux, retrieval_loss_coeff=0.1)
    loss, sums = OBJECTIVES["states"](model, config, second)(params, batch, RNGS, False)
    error, count = 0.0, 0
    for b, i in np.ndindex(B, N):
        if not batch["weight"][b, i]:
            continue
        size = int(batch["mask"][b, i].sum())
        # By itself and without padding, as an instance that nothing is mixed with.
        alone = [batch[name][b : b + 1, i : i + 1, :size] for name in ("inputs", "mask")]
        target = call(second, params["teacher"], "encode", *alone)[0]
        h = call(model, params, "encode", batch["inputs"][b : b + 1], batch["mask"][b : b + 1])
        guess = call(model, params, "states", h)[0, i, :size]
        error += np.square(guess - normalised(np.asarray(target))).mean(-1).sum()
        count += size
    np.testing.assert_allclose(sums["state_loss"], (error, count), rtol=1e-4)
    parts = {name: losses.mean(sums, f"{name}_loss") for name in ("state", "layer", "retrieval")}
    np.testing.assert_allclose(loss, parts["state"] + parts["layer"] + 0.1 * parts["retrieval"], rtol=1e-5)


def test_layers_below_are_read_at_some_positions_of_every_row(batch):
    """The same positions give the same error as reading all of them there."""
    _, model, second, params = make()
    h = call(model, params, "encode_layers", batch["inputs"], batch["mask"])
    alone = [batch[name].reshape(B * N, 1, L) for name in ("inputs", "mask")]
    known = call(second, params["teacher"], "encode_layers", *alone).reshape(2, B, N, L, -1)
    keys = jax.random.split(jax.random.key(1), B)
    total, count = losses.states_loss(model, params, h, known, batch, keys, {}, False)["layer_loss"]
    every = np.square(call(model, params, "layer_states", h[:1])[0] - normalised(np.asarray(known[0]))).mean(-1)
    weight = np.asarray(batch["mask"] * batch["weight"][..., None])
    position = np.stack([np.asarray(jax.random.permutation(key, L))[:4] for key in keys])
    rows = np.arange(B)[:, None]
    read, weighed = (np.swapaxes(x, 1, 2)[rows, position] for x in (every, weight))
    np.testing.assert_allclose((total, count), ((read * weighed).sum(), weighed.sum()), rtol=1e-5)


def test_one_layer_has_nothing_below_it(batch):
    config, model, second, params = make(model__num_layers=1)
    _, sums = OBJECTIVES["states"](model, config, second)(params, batch, RNGS, True)
    assert "state_loss" in sums
    assert "layer_loss" not in sums


@pytest.mark.parametrize("changes", [{"scan_layers": True}, {"remat": "full"}, {"scan_layers": True, "remat": "dots"}])
def test_scanned_and_recomputed_layers_are_the_same_layers(batch, changes):
    _, model, _, params = make()
    other = make(**changes)[1]
    every, others = (call(m, params, "encode_layers", batch["inputs"], batch["mask"]) for m in (model, other))
    np.testing.assert_allclose(every, others, atol=1e-5)
    last = call(model, params, "encode", batch["inputs"], batch["mask"])
    np.testing.assert_array_equal(every[-1], last)
    assert not np.allclose(every[0], every[1], atol=0.1)


def test_no_gradient_reaches_the_teacher(batch):
    config, model, second, params = make()
    grads = jax.grad(lambda p: OBJECTIVES["states"](model, config, second)(p, batch, RNGS, True)[0])(params)
    silent = {path.split("/")[0] for path, grad in leaves.flat(grads).items() if not np.any(grad)}
    # Of demux and decoder what retrieval reads, which has no weight here.
    assert silent == {"teacher", "mux", "demux", "decoder"}
    assert all(np.any(grad) for path, grad in leaves.flat(grads).items() if path.startswith(("backbone/", "state_heads/")))


def test_a_run_keeps_its_teacher_and_goes_on_without_it(plain, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(plain, teacher)
    config = learning(teacher, init_from=str(teacher), retrieval_loss_coeff=0.1)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, whole)
    stopped(config, halves, 3)
    shutil.rmtree(teacher)
    train(config, halves)
    chex.assert_trees_all_equal(params_of(whole), params_of(halves))
    learned, taught = leaves.flat(params_of(whole)), leaves.flat(load_run(plain).params)
    for path, leaf in taught.items():
        if path.startswith(("embeddings/", "backbone/")):
            np.testing.assert_array_equal(learned[f"teacher/{path}"], leaf)
            assert not np.array_equal(learned[path], leaf)
    found = lines(whole)
    assert all(np.isfinite([line["state_loss"], line["layer_loss"], line["retrieval_loss"]]).all() for line in found)


@pytest.mark.slow
def test_states_are_learned(plain, tmp_path):
    config = learning(plain, init_from=str(plain), steps=60, batch_groups=16, optimizer__learning_rate=1e-2, log_every=10)
    train(config, tmp_path / "run")
    losses_ = [line["state_loss"] + line["layer_loss"] for line in lines(tmp_path / "run")]
    assert losses_[-1] < 0.8 * losses_[0]


def test_a_task_starts_from_what_was_learned(plain, tmp_path, capsys):
    first, second = tmp_path / "states", tmp_path / "task"
    train(learning(plain, init_from=str(plain)), first)
    config = text_config(N, init_from=str(first), model__num_layers=2, steps=1, optimizer__warmup_steps=0)
    train(config, second)
    ours, theirs = leaves.flat(params_of(second)), leaves.flat(params_of(first))
    assert not any(path.startswith(("teacher/", "state_heads/")) for path in ours)
    assert "fresh: classifier/out; not used: state_heads/" in capsys.readouterr().out
    np.testing.assert_array_equal(ours["mux/instance_embedding"], theirs["mux/instance_embedding"])
    # One step of Adam moves a number by no more than the learning rate.
    np.testing.assert_allclose(ours["demux/task_out/kernel"], theirs["demux/task_out/kernel"], atol=1.1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__teacher": ""}, r"distill.teacher = '' names none.*objective = 'retrieval'"),
        ({"distill__layers": -1.0}, r"distill.layers = -1.0 is negative"),
        ({"task_loss_coeff": 0.0}, r"task_loss_coeff = 0 leaves objective = 'states'"),
        ({"demux__name": "index", "demux__prefix": "cut"}, r"demux.prefix = 'cut' pushes the last tokens out"),
        ({"objective": "mlm"}, r"objective = 'mlm' is none.*objective = 'states'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        validate(learning(**changes))


def test_teachers_that_do_not_fit_are_refused_before_anything_is_written(plain, text_run, tmp_path):
    folder = tmp_path / "several"
    folder.mkdir()
    several = common.get_config()
    common.set_runs(several, {"n1": common.instances(1), "n2": common.instances(2)})
    workdir.write_json(folder / workdir.CONFIG, json.loads(several.to_json()))
    refused = {
        r"exists neither in the new run's folder": learning(tmp_path / "nowhere"),
        r"mixes 2 instances, but states are learned from a plain network": learning(text_run, model__num_layers=1),
        r"is an experiment of several runs.*several/n1": learning(folder),
        r"is another network.*backbone/layers_1/\S+ is not here": learning(plain, model__num_layers=1),
        r"is another network.*backbone/layers_2/\S+ is not there and": learning(plain, model__num_layers=3),
        r"model.num_heads = 2 there, 4 here": learning(plain, model__num_heads=4),
        r"model.family = 'bert' there, 'electra' here": learning(plain, model__family="electra", model__tied_decoder=False),
    }
    for message, config in refused.items():
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_feature_inputs_have_no_states_to_learn():
    with pytest.raises(InputError, match=r"objective = 'states'.*needs tokens"):
        prepare(learning(data__source="digits", data__length=0))


def test_the_config_of_the_warm_up(plain):
    c = states.get_config(f"init={plain},files=texts,n=2+3,steps=50,dropout=0.2")
    assert c.runs == ("n2", "n3")
    assert (c.model.dropout_rate, c.model.attention_dropout_rate) == (0.2, 0.2)
    assert (c.objective, c.distill.teacher, c.steps, c.optimizer.warmup_steps) == ("states", str(plain), 50, 5)
    assert c.overrides.n3.mux.name == "binary_hadamard"
    assert c.overrides.n3.init_from == str(plain)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("files=x,n=2", r"is no plain encoder"),
        ("files=x,init={mixed},n=2", r"is no plain encoder"),
        ("files=x,init={mixed}", r"mixes 2 instances.*or a plain network"),
        ("files=x,init={plain},n=1+2", r"n=1 is the plain network, whose states are learned"),
    ],
)
def test_the_warm_up_wants_a_plain_encoder(arg, message, plain, text_run):
    with pytest.raises(InputError, match=message):
        states.get_config(arg.format(mixed=text_run, plain=plain))


def test_a_resumed_run_needs_no_teacher_and_others_do(plain, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(plain, teacher)
    config = learning(teacher, init_from=str(teacher), optimizer__schedule="constant")
    train(config, tmp_path / "first")
    shutil.rmtree(teacher)
    longer = learning(teacher, resume=str(tmp_path / "first"), optimizer__schedule="constant", steps=8)
    train(longer, tmp_path / "second")
    ours, theirs = (leaves.flat(params_of(tmp_path / name)) for name in ("first", "second"))
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours if path.startswith("teacher/"))
    with pytest.raises(InputError, match=r"distill.teacher = .* exists neither"):
        train(learning(teacher), tmp_path / "third")


def test_a_run_of_the_same_experiment_teaches(tmp_path):
    config = text_config(1, model__num_layers=2, steps=2)
    mixed = {**common.instances(N), "objective": "states", "distill": {"teacher": "../n1"}, "init_from": "../n1"}
    common.set_runs(config, {"n1": {}, "n2": mixed})
    scores = experiment.run(config, tmp_path / "two")["scores"]
    assert scores["n2"]["state_loss"] > 0
    config = text_config(1, model__num_layers=2)
    common.set_runs(config, {"n1": {"num_instances": 2, **common.instances(2)}, "n2": mixed})
    with pytest.raises(InputError, match=r"distill.teacher = '../n1' mixes 2 instances"):
        experiment.run(config, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_the_teacher_counts_once_and_not_as_a_parameter():
    """It has a forward pass, of every instance, and no backward pass."""
    plan = prepare(learning(retrieval_loss_coeff=0.0))
    forward = flops.matmul_flops(
        lambda params, batch: plan.objective(params, batch, {"corruption": jax.random.key(0)}, False),
        *(plan.abstract.params, plan.batch_shapes),
    )
    teacher = flops.matmul_flops(
        lambda params, batch: plan.second.apply(
            {"params": params["teacher"]}, batch["inputs"].reshape(-1, 1, 12), batch["mask"].reshape(-1, 1, 12), method="encode"
        ),
        *(plan.abstract.params, plan.batch_shapes),
    )
    assert plan.model_flops() == 3 * (forward - teacher) + teacher
    assert 0 < teacher < forward
    whole = sum(leaf.size for leaf in jax.tree.leaves(plan.abstract.params))
    assert count_params(plan.abstract.params) == whole - sum(
        leaf.size for leaf in jax.tree.leaves(plan.abstract.params["teacher"])
    )


def test_biases_of_the_heads_take_no_decay():
    params = prepare(learning()).abstract.params
    assert optimizer.decayed(params)["state_heads"] == {
        "inner_bias": False, "inner_kernel": True, "last": {"bias": False, "kernel": True},
    }  # fmt: skip


def test_every_objective_can_be_looked_into():
    assert READINGS.keys() == OBJECTIVES.keys()
