"""Multiplexers against their formulas (DataMUX, section 3.1)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax.layers import Spec
from datamux_jax.mux import GaussianHadamard

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
