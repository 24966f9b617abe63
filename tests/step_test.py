"""One update: micro-batches, one compilation, the optimizer's two rules, and how many operations it takes."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from datamux_jax import flops, optimizer, sharding
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError
from datamux_jax.plan import prepare
from datamux_jax.step import CompiledStep, born_sharded, make_step
from tests.conftest import small_config, text_config

OBJECTIVES = {
    "classification": {"retrieval_loss_coeff": 0.1},
    "retrieval": {"retrieval_percentage": 0.5},
    "mlm": {"retrieval_loss_coeff": 0.1, "mask_rate": 0.5},
    "states": {"retrieval_loss_coeff": 0.1, "distill__teacher": "nobody", "model__num_layers": 2},
    "electra": {
        "retrieval_loss_coeff": 0.1,
        "mask_rate": 0.5,
        "generator__kind": "muxed",
        "model__tied_decoder": False,
        "discriminator_loss_coeff": 1.0,
    },
}


def updates(config, count, accumulation=1):
    """The state and the sums after some updates."""
    plan = prepare(config)
    state = born_sharded(plan.make, 0, plan.mesh)
    data = pipeline.train_iterator(plan.arrays, groups=config.batch_groups, instances=config.num_instances, seed=0)
    step = jax.jit(make_step(plan.objective, plan.tx, plan.abstract, plan.mesh, accumulation))
    all_sums = []
    for batch in itertools.islice(data, count):
        state, sums = step(state, sharding.put_batch(batch, plan.mesh))
        all_sums.append(sums)
    return jax.device_get(state.params), jax.device_get(all_sums)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mlm")) for n in OBJECTIVES])
def test_micro_batches_make_the_update_of_the_whole_batch(name):
    """SGD: its updates show gradients as they are, where Adam would blow up their rounding."""
    usual = {"objective": name, "generator__hidden_size": 16, "generator__num_layers": 1}
    config = text_config(2, batch_groups=8, **(usual | OBJECTIVES[name]))
    plan = prepare(config)
    batch = sharding.put_batch(next(pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0)), plan.mesh)
    batch["weight"] = batch["weight"].at[1, 0].set(0.0)  # Micro-batches of unequal weight.
    results = []
    for count in (1, 4):
        state = born_sharded(plan.make, 0, plan.mesh)
        tx = optax.sgd(0.1)
        state = state.replace(opt_state=tx.init(state.params))
        state, sums = make_step(plan.objective, tx, state, plan.mesh, count)(state, batch)
        results.append((jax.device_get(state.params), jax.device_get(sums)))
    for other in results[1:]:
        chex.assert_trees_all_close(results[0][0], other[0], atol=1e-6)
        chex.assert_trees_all_close(results[0][1], other[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_pass_that_weighs_micro_batches_costs_nothing():
    """XLA counts a loop's body once, so two micro-batches are half of the work; the weighing pass would be a third of it more."""
    plan = prepare(text_config(2, objective="mlm", model__hidden_size=64, model__mlp_dim=256, model__num_layers=2))
    cost = {}
    for count in (1, 2):
        lowered = make_step(plan.objective, plan.tx, plan.abstract, plan.mesh, count).lower(plan.abstract, plan.batch_shapes)
        cost[count] = lowered.compile().cost_analysis()["flops"]
    assert cost[2] < 0.65 * cost[1]


def test_batches_of_another_shape_are_refused_not_compiled():
    plan = prepare(small_config())
    state = born_sharded(plan.make, 0, plan.mesh)
    batch = sharding.put_batch(next(pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0)), plan.mesh)
    step = CompiledStep(plan.jitted_step(), state, batch)
    state, _ = step(state, batch)
    with pytest.raises(InputError, match=r"inputs: float32\[8, 2, 8, 8\].* first, float32\[4, 2, 8, 8\].* now.*compiled again"):
        step(state, {name: array[:4] for name, array in batch.items()})
    state, _ = step(state, batch)
    assert int(state.step) == 2


def test_a_step_is_compiled_once_for_each_length_of_rows_and_no_other():
    plan = prepare(text_config(2, data__length=20, data__buckets=True))
    assert plan.buckets.lengths == (16, 20)
    state = born_sharded(plan.make, 0, plan.mesh)
    data = pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0, buckets=plan.buckets)
    batches = [sharding.put_batch(batch, plan.mesh) for batch in itertools.islice(data, 32)]
    by_length = {batch["mask"].shape[-1]: batch for batch in batches}
    foreseen_batches = [plan.shapes_of(8, length) for length in plan.lengths]
    for foreseen in foreseen_batches:
        assert {name: (x.shape, x.dtype) for name, x in foreseen.items()} == {
            name: (x.shape, x.dtype) for name, x in by_length[foreseen["mask"].shape[-1]].items()
        }
    step = CompiledStep(plan.jitted_step(), state, *foreseen_batches)
    for length in (16, 20, 16):
        state, sums = step(state, by_length[length])
        assert np.isfinite(sums["loss"][0])
    with pytest.raises(InputError, match=r"mask: int32\[8, 2, 20\].* first, int32\[8, 2, 18\].* now"):
        step(state, {name: x[:, :, :18] if x.ndim == 3 else x for name, x in by_length[20].items()})
    assert plan.model_flops(16) < plan.model_flops() == plan.model_flops(20)


def test_the_shapes_of_a_plan_are_those_of_its_batches():
    for config in (small_config(), text_config(), text_config(objective="mlm")):
        plan = prepare(config)
        batch = next(pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0))
        assert {name: (x.shape, x.dtype) for name, x in plan.batch_shapes.items()} == {
            name: (x.shape, jnp.asarray(x).dtype) for name, x in batch.items()
        }


def test_published_update_rule_step_by_step():
    """Hugging Face's AdamW of version 4.4, written out with numpy."""
    config = small_config(
        steps=5, optimizer__update_rule="published", optimizer__weight_decay=0.3, optimizer__schedule="linear",
        optimizer__grad_clip=0.0, optimizer__eps=1e-3,
    )  # fmt: skip
    rate, b1, b2, eps, decay = optimizer.schedule(config), 0.9, 0.999, 1e-3, 0.3
    params = {"dense": {"kernel": np.array([1.0, -2.0, 3.0]), "bias": np.array([0.5])}, "norm": {"scale": np.array([1.0])}}
    tx = optimizer.make(config)
    rng = np.random.default_rng(0)
    ours, state = jax.tree.map(jnp.asarray, params), None
    state = tx.init(ours)
    m = v = jax.tree.map(np.zeros_like, params)
    for t in range(1, 6):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape) * 1e-3, params)
        changes, state = tx.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, changes)
        m = jax.tree.map(lambda a, g: b1 * a + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda a, g: b2 * a + (1 - b2) * g * g, v, grads)
        size = float(rate(t - 1)) * np.sqrt(1 - b2**t) / (1 - b1**t)
        params = jax.tree.map(lambda p, a, b, size=size: p - size * a / (np.sqrt(b) + eps), params, m, v)
        params["dense"]["kernel"] *= 1 - float(rate(t - 1)) * decay
    chex.assert_trees_all_close(ours, params, rtol=1e-5)
    usual = optimizer.make(small_config(steps=5, optimizer__eps=1e-3))
    assert not np.allclose(usual.update(ours, usual.init(ours), ours)[0]["norm"]["scale"], changes["norm"]["scale"])


def test_the_published_rule_trains_and_leaves_frozen_leaves():
    params, _ = updates(small_config(optimizer__update_rule="published", optimizer__warmup_steps=0), 2)
    fresh, _ = updates(small_config(), 0)
    chex.assert_trees_all_equal(params["mux"], fresh["mux"])
    assert not np.allclose(params["demux"]["keys"], fresh["demux"]["keys"])


@pytest.mark.parametrize("scan", [False, True])
def test_operations_are_those_of_the_matrix_products(scan):
    config = text_config(2, objective="mlm", model__num_layers=2, scan_layers=scan)
    plan = prepare(config)
    keys = {name: jax.random.key(0) for name in ("corruption", "dropout")}
    found = flops.matmul_flops(lambda p, b: plan.objective(p, b, keys, True), plan.abstract.params, plan.batch_shapes)
    b, n, length, d, mlp, vocab = 8, 2, 12, 16, 32, 260
    block = 2 * b * length * (4 * d * d + 2 * d * mlp) + 2 * 2 * b * length * length * d
    chosen = 11  # The room for 15% of 24 tokens.
    shared = 2 * d * d * (b * length + n)  # First layer of the demultiplexer: states and keys.
    rows = 2 * b * chosen * (2 * d * d + d * vocab)
    slots = 2 * 2 * b * chosen * n  # Accuracies by slot.
    assert found == 2 * block + shared + rows + slots
    assert (
        flops.training_flops(lambda p, b: plan.objective(p, b, keys, True), plan.abstract.params, plan.batch_shapes)
        == 3 * found
    )


def test_peaks_are_found_by_the_name_of_the_chip():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert flops.peak(Device("TPU v5 lite")) == 197e12
    assert flops.peak(Device("TPU v5")) == 459e12
    assert flops.peak(Device("NVIDIA H100 80GB HBM3")) == 989e12
    assert flops.peak(jax.devices()[0]) is None
