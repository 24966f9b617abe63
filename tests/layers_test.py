"""Blocks: attention, embeddings, pooling."""

import dataclasses
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from datamux_jax import heads, layers, sharding
from datamux_jax.backbones.encoder import REMAT, Encoder
from datamux_jax.data.pipeline import format_of
from datamux_jax.errors import InputError
from datamux_jax.layers import Attention, Block, Embeddings, Spec, masked_mean
from datamux_jax.plan import assemble
from tests.conftest import text_config

SPEC = Spec(hidden_size=8, num_layers=1, num_heads=2, mlp_dim=16, init_stddev=0.5)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, 8))


def test_attention_equals_the_textbook(x):
    layer = Attention(SPEC)
    p = nn.unbox(layer.init(jax.random.key(0), x)["params"])
    q, k, v = (np.einsum("bld,dhk->blhk", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    scores = np.einsum("bqhk,bshk->bhqs", q, k) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqs,bshk,hkd->bqd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": p}, x), expected, atol=1e-5)


def test_masked_positions_are_not_read(x):
    layer = Attention(SPEC)
    params = layer.init(jax.random.key(0), x)
    mask = jnp.array([[1, 1, 1, 0, 0]] * 2)
    changed = x.at[:, 3:].add(7.0)
    out, other = layer.apply(params, x, mask), layer.apply(params, changed, mask)
    np.testing.assert_allclose(out[:, :3], other[:, :3], atol=1e-6)
    assert not np.allclose(layer.apply(params, x)[:, :3], layer.apply(params, changed)[:, :3])


def test_attention_is_uniform_where_everything_is_masked(x):
    layer = Attention(SPEC)
    params = layer.init(jax.random.key(0), x)
    out = layer.apply(params, x, jnp.zeros((2, 5)))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, np.broadcast_to(out[:, :1], out.shape), atol=1e-6)


def test_attention_without_dropout_draws_equals_the_trained_path(x):
    """Training goes through another implementation when attention has dropout; at a vanishing rate both agree."""
    quiet = Attention(Spec(**{**vars(SPEC), "attention_dropout_rate": 0.0}))
    loud = Attention(Spec(**{**vars(SPEC), "attention_dropout_rate": 1e-12}))
    params = quiet.init(jax.random.key(0), x)
    mask = jnp.array([[1, 1, 1, 0, 0]] * 2)
    drawn = loud.apply(params, x, mask, jax.random.key(0))
    np.testing.assert_allclose(quiet.apply(params, x, mask, jax.random.key(0)), drawn, atol=1e-5)


def test_block_is_post_layer_norm(x):
    block = Block(SPEC)
    out = block.apply(block.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(out.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(-1), 1, atol=1e-4)


def test_embeddings_add_positions_and_types_then_normalise():
    layer = Embeddings(SPEC, num_positions=6, vocab_size=11, type_vocab_size=2)
    ids = jnp.array([[3, 1, 4, 1]])
    p = nn.unbox(layer.init(jax.random.key(0), ids)["params"])
    total = np.asarray(p["word"]["embedding"])[ids] + np.asarray(p["position"])[:4] + np.asarray(p["type"])[0]
    expected = (total - total.mean(-1, keepdims=True)) / total.std(-1, keepdims=True)
    np.testing.assert_allclose(layer.apply({"params": p}, ids), expected, atol=1e-5)


def test_masked_mean_ignores_padding_and_survives_nothing_but_padding(x):
    mask = jnp.array([[[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]] * 2)
    out = masked_mean(x, mask)
    assert out.shape == (2, 3, 8)
    np.testing.assert_allclose(out[0, 0], x[0, :2].mean(0), atol=1e-6)
    np.testing.assert_array_equal(out[:, 1], np.zeros((2, 8)))
    np.testing.assert_allclose(out[1, 2], (x[1, 1] + x[1, 4]) / 2, atol=1e-6)


def test_roberta_counts_real_tokens_and_gives_pads_one_position():
    layer = Embeddings(SPEC, num_positions=9, vocab_size=11, pad_position=1)
    ids = jnp.array([[5, 6, 1, 7, 1, 1]])
    p = nn.unbox(layer.init(jax.random.key(0), ids)["params"])
    absolute = Embeddings(SPEC, num_positions=6, vocab_size=11)
    for j, position in enumerate([2, 3, 1, 4, 1, 1]):
        alone = {**p, "position": p["position"][position : position + 1].repeat(6, 0)}
        np.testing.assert_allclose(
            layer.apply({"params": p}, ids)[:, j], absolute.apply({"params": alone}, ids)[:, j], atol=1e-6
        )
    shifted = {**p, "position": p["position"][2:8]}
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))
    mixed = layer.apply({"params": p}, x, method="refine")
    np.testing.assert_allclose(mixed, absolute.apply({"params": shifted}, x, method="refine"), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", sorted(REMAT))
def test_scanning_and_rematerialising_change_no_number(x, scan, remat):
    spec = dataclasses.replace(SPEC, num_layers=3, dropout_rate=0.2, attention_dropout_rate=0.2)
    plain, other = Encoder(spec), Encoder(dataclasses.replace(spec, scan=scan, remat=remat))
    params = plain.init(jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, other.init(jax.random.key(0), x))
    mask = jnp.array([[1, 1, 1, 0, 0], [1] * 5])

    def loss(encoder):
        apply = lambda p: jnp.square(encoder.apply(p, x, mask, True, rngs={"dropout": jax.random.key(2)})).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(apply))(params)

    chex.assert_trees_all_close(loss(plain), loss(other), atol=1e-6)
    jaxpr = str(jax.make_jaxpr(lambda p: other.apply(p, x))(params))
    assert ("scan[" in jaxpr) == scan
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (remat != "none")


@pytest.mark.parametrize("gradients", [heads.own_product, heads.one_product])
def test_the_scores_of_a_vocabulary_have_the_gradient_of_a_product_and_a_sum(gradients):
    x, table = jax.random.normal(jax.random.key(0), (3, 4, 5)), jax.random.normal(jax.random.key(1), (7, 5))
    bias = jnp.arange(7.0)

    def loss(scores, *args):
        return jnp.sin(scores(*args)).sum()

    expected = jax.grad(loss, (1, 2, 3))(lambda x, table, bias: x @ table.T + bias, x, table, bias)
    for one, other in zip(jax.grad(loss, (1, 2, 3))(heads.scores, x, table, bias), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(x, jnp.cos(x @ table.T + bias)), expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_attention_on_cpus_is_that_of_jax():
    q, k, v = (jax.random.normal(jax.random.key(i), (3, 6, 2, 4)) for i in range(3))
    padded = jnp.arange(6) < jnp.array([[6], [4], [0]])
    for mask in (None, padded[:, None, None], padded[:1, None, None], jnp.tril(jnp.ones((6, 6), bool))[None, None]):

        def loss(attend, q, k, v, mask=mask):
            return jnp.sin(attend(q, k, v, mask)).sum()

        expected = jax.value_and_grad(loss, (1, 2, 3))(
            lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), q, k, v
        )
        chex.assert_trees_all_close(jax.value_and_grad(loss, (1, 2, 3))(layers.heads_first, q, k, v), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_the_exact_one(dtype):
    x = jnp.linspace(-8, 8, 2001).astype(dtype)
    exact = np.asarray(x, np.float64) * scipy.stats.norm.cdf(np.asarray(x, np.float64))
    found = layers.gelu(x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0 if dtype == "float32" else 2**-8, atol=1e-6)


def assume_cuda(monkeypatch):
    """Programs can be lowered for GPUs with cuDNN, which is not here; not run."""
    monkeypatch.setattr(layers, "on_cuda", lambda: True)
    installed = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", installed)


@pytest.mark.parametrize("masked", [True, False])
def test_on_cuda_attention_becomes_cudnns(monkeypatch, masked):
    """Lowered for a GPU, not run: what the compiler is given calls the fused kernel, forwards and backwards, and only there."""
    q = jnp.ones((2, 6, 2, 8), jnp.bfloat16)
    mask = jnp.ones((2, 1, 1, 6), bool) if masked else None
    gradient = jax.grad(lambda q: layers.attend(q, q, q, mask, "cudnn").astype(jnp.float32).sum())
    of_xla = gradient(q)

    def lowered(platform):
        return jax.jit(lambda q: gradient(q)).trace(q).lower(lowering_platforms=(platform,)).as_text()

    assert "__cudnn$fmha" not in lowered("cuda"), "JAX runs on CPUs here: cuDNN could not be asked"
    assume_cuda(monkeypatch)
    text = lowered("cuda")
    assert "__cudnn$fmhaSoftmax" in text or "__cudnn$fmhaScaleBiasSoftmax" in text, text
    assert "Backward" in text
    assert "__cudnn$fmha" not in lowered("cpu") + lowered("tpu")
    chex.assert_trees_all_equal(gradient(q), of_xla)
    if masked:
        with pytest.raises(InputError, match="rows of an even number of positions, but these have 5"):
            jax.make_jaxpr(lambda q: layers.attend(q, q, q, mask[..., :5], "cudnn"))(q[:, :5])


def test_a_step_with_cudnn_is_lowered_where_blocks_are_mapped(monkeypatch):
    """Over instances, by a plain generator and the contextual multiplexer: cuDNN's attention cannot be, under a mask."""
    assume_cuda(monkeypatch)
    changes = {"objective": "electra", "generator__kind": "plain", "mux__name": "contextual", "dtype": "bfloat16"}
    config = text_config(2, attention="cudnn", batch_groups=8, **changes)
    plan = assemble(config, format_of(config), sharding.make_mesh(config, config.batch_groups))
    step = plan.jitted_step().trace(plan.abstract, plan.batch_shapes).lower(lowering_platforms=("cuda",))
    assert step.as_text().count("__cudnn$fmha") == 2 * config.model.num_layers, "forwards and backwards"
