"""Objectives, retrieval targets and the sums they return."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import corruption, losses, metrics, optimizer, vocabulary
from datamux_jax.build import build, build_second
from datamux_jax.families import SpecialTokens
from datamux_jax.losses import draw_retrieval, every_retrieval, retrieval_loss
from datamux_jax.objectives import OBJECTIVES
from datamux_jax.train import train
from tests.conftest import fresh_params, text_config

B, N, L, V, C = 4, 2, 6, 20, 3
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, mlp_first=1, filler=17, index=19, index_cls=1)


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(0), 2)
    mask = (jnp.arange(L) < jnp.array([L, 3])[:, None]).astype(jnp.int32)
    return {
        "inputs": jax.random.randint(keys[0], (B, N, L), 4, 17) * mask,
        "mask": jnp.broadcast_to(mask, (B, N, L)),
        "label": jax.random.randint(keys[1], (B, N), 0, C),
        "weight": jnp.ones((B, N)),
    }


def make(**changes):
    config = text_config(N, **changes)
    model = build(config, num_classes=C, vocab_size=V, max_length=L, tokens=TOKENS)
    params = fresh_params(model, (1, N, L))
    return config, model, params


KEYS = jax.random.split(jax.random.key(3), B)
RNGS = {"corruption": jax.random.key(7), "dropout": jax.random.key(8)}


def test_targets_are_the_drawn_instances_tokens(batch):
    _, model, _ = make()
    instance, target, weight, position = draw_retrieval(model, KEYS, batch["inputs"], 1.0)
    np.testing.assert_array_equal(position, [list(range(L))] * B)
    for b, j in np.ndindex(B, L):
        assert target[b, j] == batch["inputs"][b, instance[b, j], j]
        assert weight[b, j] == batch["mask"][b, instance[b, j], j]


def test_no_position_of_an_index_prefix_is_asked_for(batch):
    _, model, params = make(demux__name="index")
    fed = model.feed(batch["inputs"])
    instance, target, weight, position = draw_retrieval(model, KEYS, fed, 1.0)
    np.testing.assert_array_equal(position, [list(range(N + 1, N + 1 + L))] * B)
    for b, j in np.ndindex(B, L):
        assert target[b, j] == batch["inputs"][b, instance[b, j], j]
    h = model.apply({"params": params}, batch["inputs"], batch["mask"], method="encode")
    drawn = (instance, target, weight, position)
    shapes = str(jax.make_jaxpr(lambda p: retrieval_loss(model, p, h, drawn, {}, False))(params))
    assert f"[{B},{L},{V}]" in shapes
    assert f"[{B},{L + N + 1},{V}]" not in shapes


def test_instances_are_drawn_uniformly_and_a_share_of_positions_kept():
    _, model, _ = make()
    tokens = 4 + jnp.arange(64 * 4 * 64).reshape(64, 4, 64) % 16
    instance, target, weight, position = map(np.asarray, draw_retrieval(model, jax.random.split(KEYS[0], 64), tokens, 0.25))
    assert instance.shape[1] == corruption.capacity(64, 0.25) < 64
    np.testing.assert_allclose(np.bincount(instance[weight > 0], minlength=4) / weight.sum(), 0.25, atol=0.05)
    np.testing.assert_allclose(weight.sum() / 4096, 0.25, atol=0.03)
    group = np.arange(64)[:, None]
    np.testing.assert_array_equal(target, np.asarray(tokens)[group, instance, position])


def test_the_loss_is_the_weighted_sum_of_its_parts(batch):
    config, model, params = make(task_loss_coeff=0.9, retrieval_loss_coeff=0.1)
    loss, sums = OBJECTIVES["classification"](model, config)(params, batch, RNGS, False)
    means = metrics.means(jax.device_get(sums))
    np.testing.assert_allclose(loss, 0.9 * means["task_loss"] + 0.1 * means["retrieval_loss"], rtol=1e-5)
    np.testing.assert_allclose(means["loss"], loss, rtol=1e-6)


def test_without_a_coefficient_no_vocabulary_logits_exist(batch):
    config, model, params = make(retrieval_loss_coeff=0.0)
    objective = OBJECTIVES["classification"](model, config)
    shapes = str(jax.make_jaxpr(lambda p: objective(p, batch, RNGS, False))(params))
    assert f"[{B},{L},{V}]" not in shapes
    assert "retrieval_loss" not in objective(params, batch, RNGS, False)[1]


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"retrieval", "states"}))
def test_fillers_carry_no_loss(batch, name):
    """But for retrieval, where they count as in the published code."""
    config, model, params = make(retrieval_loss_coeff=0.0, model__pool="first", objective=name, mask_rate=0.5)
    objective = jax.jit(OBJECTIVES[name](model, config), static_argnums=3)
    if name == "tagging":
        batch = {**batch, "label": jnp.where(batch["mask"] == 1, batch["inputs"] % C, -100)}
    batch = {**batch, "weight": batch["weight"].at[3].set(0)}
    changed = {**batch, "inputs": batch["inputs"].at[3].set(5), "label": batch["label"].at[3].set(0)}
    np.testing.assert_allclose(objective(params, batch, RNGS, False)[0], objective(params, changed, RNGS, False)[0], rtol=1e-6)
    other = {**batch, "inputs": batch["inputs"].at[0].set(5)}
    assert not np.allclose(objective(params, batch, RNGS, False)[0], objective(params, other, RNGS, False)[0])


@pytest.mark.parametrize("learned", [False, True])
def test_gradient_reaches_every_trained_leaf_and_no_frozen_one(batch, learned):
    config, model, params = make(retrieval_loss_coeff=0.1, mux__learned=learned, model__init_stddev=0.3)
    grads = jax.jit(jax.grad(lambda p: OBJECTIVES["classification"](model, config)(p, batch, RNGS, True)[0]))(params)
    frozen = optimizer.frozen(params, learned)
    assert jax.tree.map(lambda g: not bool(jnp.any(g != 0)), grads) == frozen


def test_every_retrieval_counts_each_real_token_once(batch):
    _, model, params = make()
    h = model.apply({"params": params}, batch["inputs"], batch["mask"], method="encode")
    right, count = every_retrieval(model, params, h, batch)["retrieval_accuracy"]
    np.testing.assert_array_equal(count, [B * (L - 1), B * 2])
    assert (np.asarray(right) <= np.asarray(count)).all()


def test_sums_merge_without_bias():
    parts = [{"a": (np.array([1.0, 0.0]), np.array([1.0, 3.0]))}, {"a": (np.array([3.0, 3.0]), np.array([3.0, 3.0]))}]
    assert metrics.means(metrics.merge(parts)) == {"a": 0.7, "a_per_slot": [1.0, 0.5]}


def test_a_mean_of_nothing_is_nothing():
    assert metrics.means({"a": (np.zeros(()), np.zeros(()))}) == {"a": None}


@pytest.mark.parametrize("kind", ["plain", "muxed"])
def test_generator_and_discriminator_share_embeddings_exactly_when_they_are_as_wide(kind):
    shared = electra(kind, generator__hidden_size=32)
    assert "embeddings" not in shared[3]["generator"]
    apart = electra(kind, generator__embedding_size=8)
    assert apart[3]["generator"]["embeddings"]["word"]["embedding"].shape == (V, 8)
    assert apart[3]["embeddings"]["word"]["embedding"].shape == (V, 16)


def electra(kind, **changes):
    usual = {"objective": "electra", "mask_rate": 0.5, "generator__hidden_size": 16, "generator__num_layers": 1}
    config = text_config(N, **(usual | {"generator__kind": kind} | changes))
    model = build(config, num_classes=C, vocab_size=V, max_length=L, tokens=TOKENS)
    generator = build_second(config, model)
    params = fresh_params(model, (1, N, L), generator=generator)
    return config, model, generator, params


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "muxed"])
def test_electra_adds_up_its_parts(batch, kind):
    config, model, generator, params = electra(kind, retrieval_loss_coeff=0.1, task_loss_coeff=0.9)
    loss, sums = OBJECTIVES["electra"](model, config, generator)(params, batch, RNGS, False)
    means = metrics.means(jax.device_get(sums))
    discriminator = 0.9 * means["task_loss"] + 0.1 * means["retrieval_loss"]
    generated = means["generator_mlm_loss"]
    if kind == "muxed":  # With retrieval of its own.
        generated = 0.9 * generated + 0.1 * means["generator_retrieval_loss"]
    np.testing.assert_allclose(loss, generated + 50 * discriminator, rtol=1e-5)


def test_a_uniform_filling_counts_as_replaced_even_where_it_hits_the_original(batch, monkeypatch):
    """As released; and fillings differ from position to position."""
    config, model, _, params = electra("uniform")
    seen = {}

    def spy(model, params, h, batch, rngs, train):
        seen["replaced"] = np.asarray(batch["label"])
        return {"task_loss": (jnp.zeros(()), jnp.ones(()))}

    encode = type(model).encode

    def watched(self, inputs, mask, train=False):
        seen["inputs"] = np.asarray(inputs)
        return encode(self, inputs, mask, train)

    monkeypatch.setattr(losses, "replaced_loss", spy)
    monkeypatch.setattr(type(model), "encode", watched)
    keys = corruption.split(corruption.group_keys(RNGS["corruption"], B), 3)[0]
    masked, _ = corruption.mask_for_electra(keys, batch["inputs"], TOKENS, 0.5)
    OBJECTIVES["electra"](model, config, None)(params, batch, RNGS, False)
    holes = np.asarray(masked) == TOKENS.mask
    np.testing.assert_array_equal(seen["replaced"], holes)
    np.testing.assert_array_equal(seen["inputs"][~holes], np.asarray(batch["inputs"])[~holes])
    assert len(set(seen["inputs"][holes])) > 3
    monkeypatch.setattr(corruption, "draw_tokens", lambda keys, tokens, vocab_size: tokens)
    OBJECTIVES["electra"](model, config, None)(params, batch, RNGS, False)
    np.testing.assert_array_equal(seen["replaced"], holes)


@pytest.mark.parametrize("name", ["mlm", "electra"])
def test_pre_training_asks_for_padding_too(batch, name, monkeypatch):
    """As published; fine-tuning and warm-up do not."""
    counted = []
    original = losses.retrieval_loss
    monkeypatch.setattr(
        losses, "retrieval_loss", lambda m, p, h, drawn, *rest: counted.append(drawn[2]) or original(m, p, h, drawn, *rest)
    )
    config, model, params = make(objective=name, retrieval_loss_coeff=0.1)
    OBJECTIVES[name](model, config)(params, batch, RNGS, False)
    assert counted[0].all()
    config, model, params = make(objective="retrieval")
    OBJECTIVES["retrieval"](model, config)(params, batch, RNGS, False)
    assert not counted[1].all()


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "muxed"])
def test_a_sample_that_hits_the_original_is_not_replaced(batch, kind, monkeypatch):
    seen = {}

    def spy(model, params, h, batch, rngs, train):
        seen["replaced"] = np.asarray(batch["label"])
        return {"task_loss": (jnp.zeros(()), jnp.ones(()))}

    monkeypatch.setattr(losses, "replaced_loss", spy)
    monkeypatch.setattr(corruption, "sample_tokens", lambda keys, logits: jnp.full(logits.shape[:-1], 7))
    config, model, generator, params = electra(kind)
    objective = OBJECTIVES["electra"](model, config, generator)
    objective(params, batch, RNGS, False)
    assert seen["replaced"].any()
    assert not seen["replaced"][np.asarray(batch["inputs"]) == 7].any()
    assert not seen["replaced"][np.asarray(batch["mask"]) == 0].any()
    objective(params, {**batch, "inputs": 7 * batch["mask"]}, RNGS, False)
    assert not seen["replaced"].any()


@pytest.mark.parametrize("objective", ["retrieval", "mlm", pytest.param("electra", marks=pytest.mark.slow)])
def test_logits_in_pieces_give_the_same_loss_and_gradients_and_never_exist_as_a_whole(batch, objective):
    if objective == "electra":
        config, model, _, params = electra("plain", retrieval_loss_coeff=0.1)
    else:
        config, model, params = make(objective=objective, retrieval_loss_coeff=0.1, mask_rate=0.5)

    def differentiated(mib):
        network = model.clone(parent=None, logits_mib=mib)
        loss = OBJECTIVES[objective](network, config, build_second(config, network))
        return jax.value_and_grad(lambda params: loss(params, batch, RNGS, True), has_aux=True)

    largest = 2 * B * V * 4  # Bytes of the logits at two positions of every group; their gradient has as many.
    whole, pieces = differentiated(2048), differentiated(2 * largest / 2**20)
    for expected, got in zip(*(jax.tree.leaves(jax.jit(f)(params)) for f in (whole, pieces)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    sizes = [[int(np.prod(s)) for s in shapes_over_vocabulary(jax.make_jaxpr(f)(params))] for f in (whole, pieces)]
    assert max(sizes[1]) * 4 <= largest < max(sizes[0]) * 4


@pytest.mark.parametrize(("bound", "size"), [(2.5, 2), (1.9, 1), (0.5, 1), (4.0, 4), (5.0, 5), (99, 5)])
def test_pieces_are_rounded_so_that_logits_and_gradient_keep_the_bound(bound, size):
    """`bound` in positions: 5 of them in two pieces would be 3 and 2, which 2.5 has no room for."""
    _, model, _ = make(objective="mlm")
    mib = bound * B * V * 4 * 2 / 2**20
    assert vocabulary.piece_size(model.clone(parent=None, logits_mib=mib), B, 5) == size


def test_scoring_in_one_pass_changes_no_number():
    """Of equal logits the first is the likeliest, both ways."""
    logits = jnp.round(4 * jax.random.normal(jax.random.key(0), (6, 40, 9))) / 2  # Rounded: many are equal.
    target = jax.random.randint(jax.random.key(1), (6, 40), 0, 9)

    def loss(score, logits):
        found, right = score(logits, target)
        return jnp.sin(found).sum(), (found, right)

    one, other = (
        jax.jit(jax.value_and_grad(lambda logits, score=score: loss(score, logits), has_aux=True))(logits)
        for score in (vocabulary.scored, vocabulary.scored_at_once)
    )
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)
    right, tied = one[0][1][1], (logits == logits.max(-1, keepdims=True)).sum(-1) > 1
    assert 0 < (right & tied).sum() < tied.sum(), "nothing is tied"


def test_training_holds_no_more_for_the_vocabulary_than_the_bound():
    """Temporaries of the compiled gradient, by the compiler, beside those of the smallest pieces."""
    groups, positions, width, size = 8, 64, 16, 2048
    config = text_config(1, objective="mlm", model__hidden_size=width, model__embedding_size=width)
    model = build(config, num_classes=0, vocab_size=size, max_length=positions, tokens=TOKENS)
    params = fresh_params(model, (1, 1, positions))
    states = jax.ShapeDtypeStruct((groups, positions, width), jnp.float32)
    target = jax.ShapeDtypeStruct((groups, positions), jnp.int32)

    def temporaries(mib):
        network = model.clone(parent=None, logits_mib=mib)
        gradient = jax.grad(lambda p, *arrays: vocabulary.cross_entropy(network, p, *arrays)[0].sum(), argnums=(0, 1))
        return jax.jit(gradient).lower(params, states, target).compile().memory_analysis().temp_size_in_bytes

    least = temporaries(0.001)  # One position: 64 KiB of logits.
    for mib in (1.0, 2.0, 3.8):
        assert temporaries(mib) - least < mib * 2**20, mib
    assert temporaries(64) - least > 4 * 2**20  # All of them.


def shapes_over_vocabulary(program):
    """Shapes `[B, P, V]` of all values in a program."""
    found = re.findall(rf"f32\[([\d,]+,{V})\]", str(program))
    return [shape for text in found if len(shape := [int(size) for size in text.split(",")]) > 2]


@pytest.mark.slow
def test_electra_with_a_learned_generator_learns_from_real_text(tmp_path):
    """100 steps on CLDR phrases; the published code for a muxed generator cannot run."""
    for kind in ("plain", "muxed"):
        config = text_config(
            objective="electra",
            generator__kind=kind,
            generator__hidden_size=16,
            generator__num_layers=1,
            steps=100,
            log_every=20,
            retrieval_loss_coeff=0.1,
            task_loss_coeff=0.9,
            optimizer__learning_rate=3e-3,
        )
        train(config, tmp_path / kind)
        lines = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        first, last = lines[0], lines[-1]
        assert last["step"] == 100
        for name in ("loss", "generator_mlm_loss", "task_loss", "retrieval_loss"):
            assert last[name] < 0.98 * first[name], (kind, name, first[name], last[name])
