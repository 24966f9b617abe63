"""Multiplexers against their formulas (DataMUX, section 3.1)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax.errors import InputError
from datamux_jax.layers import Spec
from datamux_jax.mux import (
    BinaryHadamard,
    Contextual,
    GaussianAttention,
    GaussianHadamard,
    RandomOrtho,
    RandomOrthoLowRank,
    chunk_masks,
    low_rank_matrices,
    mixing_block,
    orthogonal_matrices,
)

N, E = 3, 8
SPEC = Spec(hidden_size=E, num_layers=1, num_heads=2, mlp_dim=16)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, N, 5, E))


def init(mux, x):
    return jax.tree.map(jnp.asarray, mux.init(jax.random.key(0), x)["params"])


def unboxed(params):
    return params["instance_embedding"].value


def test_hadamard_is_the_mean_of_products(x):
    mux = GaussianHadamard(SPEC, N)
    params = {"instance_embedding": unboxed(init(mux, x))}
    v = np.asarray(params["instance_embedding"])
    expected = np.zeros((2, 5, E))
    for b in range(2):
        for i in range(N):
            expected[b] += v[i] * np.asarray(x)[b, i] / N
    np.testing.assert_allclose(mux.apply({"params": params}, x), expected, atol=1e-6)


@pytest.mark.parametrize(("norm", "expected"), [(1.0, 1.0), (20.0, 20.0), (0.0, E**0.5)])
def test_vectors_have_the_norm_asked_for(x, norm, expected):
    v = unboxed(init(GaussianHadamard(SPEC, N, norm=norm), x))
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_gradient_reaches_the_vectors_only_if_they_are_learned(x, learned):
    mux = GaussianHadamard(SPEC, N, learned=learned)
    params = {"instance_embedding": unboxed(init(mux, x))}
    gradient = jax.grad(lambda p: (mux.apply({"params": p}, x) ** 2).sum())(params)["instance_embedding"]
    assert bool(jnp.any(gradient != 0)) is learned


def test_permuting_instances_and_vectors_changes_nothing(x):
    mux = GaussianHadamard(SPEC, N)
    v = unboxed(init(mux, x))
    order = jnp.array([2, 0, 1])
    out = mux.apply({"params": {"instance_embedding": v}}, x)
    permuted = mux.apply({"params": {"instance_embedding": v[order]}}, x[:, order])
    np.testing.assert_allclose(out, permuted, atol=1e-6)


def test_bfloat16_stays_bfloat16(x):
    mux = GaussianHadamard(dataclasses.replace(SPEC, dtype="bfloat16"), N)
    params = mux.init(jax.random.key(0), x)
    assert mux.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def params_of(mux, x, mask=None):
    boxed = mux.init(jax.random.key(0), x, mask)["params"]
    return nn.unbox(boxed)


def test_binary_masks_are_chunks_and_the_last_one_ends_at_the_end():
    masks = chunk_masks(0.0)(jax.random.key(0), (3, 10))
    expected = ["1110000000", "0001110000", "0000001111"]
    assert ["".join(str(int(v)) for v in row) for row in masks] == expected


def test_binary_masks_overlap_by_epsilon_chunks_at_inner_boundaries_only():
    masks = chunk_masks(0.5)(jax.random.key(0), (2, 16))
    assert ["".join(str(int(v)) for v in row) for row in masks] == ["1111111111000000", "0000001111111111"]
    assert int((masks[0] * masks[1]).sum()) == 4  # Half of a chunk of 8.
    third = chunk_masks(0.5)(jax.random.key(0), (3, 10))  # 0.75 dimensions on both sides, cut to whole ones.
    assert ["".join(str(int(v)) for v in row) for row in third] == ["1110000000", "0011110000", "0000011111"]


def test_binary_is_the_mean_of_masked_instances(x):
    mux = BinaryHadamard(SPEC, N, epsilon=0.5)
    params = params_of(mux, x)
    masks = np.asarray(chunk_masks(0.5)(jax.random.key(0), (N, E)))
    np.testing.assert_array_equal(params["instance_embedding"], masks)
    expected = (np.asarray(x) * masks[:, None]).mean(1)
    np.testing.assert_allclose(mux.apply({"params": params}, x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [RandomOrtho, RandomOrthoLowRank])
def test_ortho_is_the_sum_of_transformed_instances_over_sqrt_n(x, kind):
    mux = kind(SPEC, N)
    params = params_of(mux, x)
    w = np.asarray(params["instance_embedding"])
    expected = sum(np.asarray(x)[:, i] @ w[i].T for i in range(N)) / np.sqrt(N)
    np.testing.assert_allclose(mux.apply({"params": params}, x), expected, atol=1e-5)


def test_matrices_are_orthogonal_and_haar_random():
    w = np.asarray(orthogonal_matrices(jax.random.key(0), (500, 6, 6)))
    np.testing.assert_allclose(w @ w.transpose(0, 2, 1), np.broadcast_to(np.eye(6), w.shape), atol=1e-5)
    # Of a Haar matrix, entries have mean 0 and variance 1/E, and both determinants are as likely.
    np.testing.assert_allclose(w.mean(0), 0, atol=0.1)
    np.testing.assert_allclose((w**2).mean(0), 1 / 6, atol=0.04)
    assert 0.4 < (np.linalg.det(w) > 0).mean() < 0.6


def test_low_rank_matrices_keep_a_block_each():
    """`W_i = U H_i^T`: rank `E // N`, an isometry on its block, and no direction of the input is read by two instances."""
    n, e = 3, 10
    w = np.asarray(low_rank_matrices(jax.random.key(1), (n, e, e)))
    for i in range(n):
        np.testing.assert_allclose(np.linalg.svd(w[i], compute_uv=False), [1] * 3 + [0] * 7, atol=1e-5)
        for j in range(n):
            if i != j:
                np.testing.assert_allclose(w[i] @ w[j].T, 0, atol=1e-5)
    # The blocks of one rotation: all of them and the columns left over make up U H^T, a rotation.
    whole = np.asarray(low_rank_matrices(jax.random.key(1), (1, e, e)))[0]
    np.testing.assert_allclose(whole @ whole.T, np.eye(e), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(whole), 1, atol=1e-5)


def block_on(mux, params, name, rows, mask=None):
    block = mixing_block(mux)
    return np.asarray(block.apply({"params": params[name]}, rows, mask))


@pytest.mark.parametrize("mask_instances", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_contextual_equals_its_formula_one_row_at_a_time(x, mask_instances):
    mux = Contextual(dataclasses.replace(SPEC, init_stddev=0.5), N, mask_instances=mask_instances)
    mask = jnp.array([[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]] * 2)
    params = params_of(mux, x, mask)
    v = np.asarray(params["instance_embedding"])
    g = np.zeros(x.shape)
    for b, i in np.ndindex(2, N):
        own = x[b, i][None]
        g[b, i] = v[i] * (block_on(mux, params, "over_positions", own, mask[b, i][None]) + own)[0]
    expected = np.zeros((2, 5, E))
    for b, j in np.ndindex(2, 5):
        across = g[b, :, j][None].astype("f")
        second = block_on(mux, params, "over_instances", across, mask[b, :, j][None] if mask_instances else None)
        expected[b, j] = (second + across)[0].mean(0)
    np.testing.assert_allclose(mux.apply({"params": params}, x, mask), expected, atol=1e-5)


def test_gaussian_attention_equals_its_formula(x):
    mux = GaussianAttention(dataclasses.replace(SPEC, init_stddev=0.5), N)
    params = params_of(mux, x)
    g = np.asarray(params["instance_embedding"])[:, None] * np.asarray(x)
    inner = g.mean(1) @ np.asarray(params["cross"]["kernel"]) + np.asarray(params["cross"]["bias"])
    inner = np.asarray(jax.nn.gelu(inner, approximate=False))
    inner = (inner - inner.mean(-1, keepdims=True)) / np.sqrt(inner.var(-1, keepdims=True) + 1e-5)
    attended = np.stack([block_on(mux, params, "over_positions", g[:, i].astype("f")) for i in range(N)], axis=1)
    np.testing.assert_allclose(mux.apply({"params": params}, x), attended.mean(1) + inner, atol=1e-5)


def test_attention_needs_a_width_that_heads_divide(x):
    mux = Contextual(dataclasses.replace(SPEC, embedding_size=7), N)
    with pytest.raises(InputError, match=r"embedding width 7, which model.num_heads = 2 does not divide"):
        mux.init(jax.random.key(0), x[..., :7], jnp.ones(x.shape[:3]))
