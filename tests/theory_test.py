"""The exact construction against separate layers, through the real multiplexer, attention and block."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import residue, theory
from datamux_jax.errors import InputError
from datamux_jax.layers import Attention, Block, Spec
from datamux_jax.mux import Contextual, RandomOrthoLowRank, low_rank_matrices

SPEC = Spec(hidden_size=8, num_layers=1, num_heads=2, mlp_dim=12, init_stddev=0.5)
# N, heads, d, D: as narrow as possible; one head; room to spare, and wider heads; as many heads as dimensions.
CASES = [(2, 2, 8, 16), (4, 1, 6, 24), (3, 2, 8, 60), (5, 4, 4, 40)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
L = 5


def weights(layer, spec, seed=3):
    """Random parameters of every kind, biases and scales included."""
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, L, spec.hidden_size)))["params"])
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draws.normal(0, 0.4, leaf.shape), spec.dtype), params)


class Setting:
    """Instances, their mixer and their places, in the dtype of `spec`."""

    def __init__(self, n, spec, size):
        self.spec, self.mixed = spec, theory.mixed_spec(spec, n, size)
        draws = np.random.default_rng(n)
        self.z = jnp.asarray(draws.normal(size=(2, n, L, spec.hidden_size)), spec.dtype)
        self.mux = RandomOrthoLowRank(self.mixed, n)
        matrices = jax.jit(lambda key: low_rank_matrices(key, (n, size, size), jnp.dtype(spec.dtype)))
        self.mixing = {"instance_embedding": matrices(jax.random.key(n))}
        self.places = theory.subspaces(theory.mixing_matrices(self.mux, self.mixing), spec.hidden_size, jax.random.key(1))

    def row(self, z):
        return self.mux.apply({"params": self.mixing}, self.places.enter(z))

    def together(self, layer, params, mask=None, z=None):
        """Enter, mix, the layer (or layers, if `params` is a list), demultiplex."""
        layers = params if isinstance(params, list) else [params]
        run = jax.jit(lambda layers, z: self.places.demultiplex(theory.stack(layer, layers, self.row(z), mask)))
        out = run(layers, self.z if z is None else z)
        assert out.dtype == self.z.dtype
        return out

    def apart(self, layer, params, mask=None):
        layers = params if isinstance(params, list) else [params]
        return jax.jit(jax.vmap(lambda z: theory.stack(layer, layers, z, mask), in_axes=1, out_axes=1))(self.z)


def setting(dtype="float32", case=CASES[0]):
    n, heads, width, size = case
    return Setting(n, dataclasses.replace(SPEC, hidden_size=width, num_heads=heads, dtype=dtype), size)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_attention_computes_n_attentions(dtype, case):
    with jax.enable_x64(dtype == "float64"):
        s = setting(dtype, case)
        single = weights(Attention(s.spec), s.spec)
        mask = jnp.array([[1] * L, [1, 1, 1, 0, 0]])
        found = s.together(Attention(s.mixed), theory.attention_weights(single, s.places, s.mixed), mask)
        np.testing.assert_allclose(found, s.apart(Attention(s.spec), single, mask), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_of_flax_attention_fit(use_bias):
    s = setting()
    single = nn.MultiHeadDotProductAttention(
        2, use_bias=use_bias, kernel_init=nn.with_partitioning(nn.linear.default_kernel_init, (None,))
    )
    boxed = single.init(jax.random.key(0), s.z[:, 0])["params"]
    expected = jax.vmap(lambda z: single.apply({"params": nn.unbox(boxed)}, z), in_axes=1, out_axes=1)(s.z)
    found = s.together(Attention(s.mixed), theory.attention_weights(boxed, s.places, s.mixed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stacks_of_blocks_without_norm_are_exact(dtype):
    with jax.enable_x64(dtype == "float64"):
        s = setting(dtype, CASES[2])
        layers = [weights(theory.PlainBlock(s.spec), s.spec, seed) for seed in range(3)]
        # Of variance 1 after three layers that each add to the state, like the states that the tolerance is meant for.
        layers = jax.tree.map(lambda leaf: 0.5 * leaf, layers)
        mixed = [theory.block_weights(single, s.places, s.mixed) for single in layers]
        found = s.together(theory.PlainBlock(s.mixed), mixed)
        np.testing.assert_allclose(found, s.apart(theory.PlainBlock(s.spec), layers), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_post_ln_blocks_are_exact_with_a_norm_of_each_instance_and_only_so(dtype):
    with jax.enable_x64(dtype == "float64"):
        s = setting(dtype, CASES[2])
        single = weights(Block(s.spec), s.spec)
        apart = s.apart(Block(s.spec), single)
        params = theory.normed_block_weights(single, s.places, s.mixed)
        block = theory.InstanceNormBlock(s.mixed, 3, 8)
        shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, L, 60)))["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(shapes))
        np.testing.assert_allclose(s.together(block, params), apart, rtol=0, atol=TOLERANCE[dtype])
        # A state is 1 / sqrt(N) as large in the row: the scale is right, and still the statistics of all instances are mixed.
        norm = {"scale": jnp.full(60, 3**-0.5, dtype), "bias": jnp.zeros(60, dtype)}
        full = {**params, "attention_norm": norm, "mlp_norm": norm}
        assert np.abs(s.together(Block(s.mixed), full) - apart).max() > 0.1


def test_perturbing_one_instance_leaves_every_other_output_unchanged():
    s = setting(case=CASES[3])
    single = weights(Block(s.spec), s.spec)
    mixed, attention = theory.block_weights(single, s.places, s.mixed), single["attention"]
    runs = [
        (theory.PlainBlock(s.mixed), mixed),
        (theory.InstanceNormBlock(s.mixed, 5, 4), theory.normed_block_weights(single, s.places, s.mixed)),
        (Attention(s.mixed), theory.attention_weights(attention, s.places, s.mixed)),
    ]
    for layer, params in runs:
        before = s.together(layer, params)
        after = s.together(layer, params, z=s.z.at[:, 2].add(3.0))
        change = np.abs(after - before).max(axis=(0, 2, 3))
        assert change[2] > 0.1
        assert np.delete(change, 2).max() < 1e-5


def test_demultiplexing_is_a_projection():
    s = setting(case=CASES[2])
    np.testing.assert_allclose(s.places.demultiplex(s.row(s.z)), s.z, atol=1e-5)
    mixed = np.einsum("mde,nef->mndf", s.places.read_NxdxD, s.places.write_NxDxd)
    np.testing.assert_allclose(mixed, np.einsum("mn,df->mndf", np.eye(3), np.eye(8)), atol=1e-6)
    np.testing.assert_allclose(s.places.jointly().read_NxdxD, s.places.read_NxdxD, atol=1e-5)


def test_matrices_are_those_of_the_multiplexer():
    s = setting()
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 2, L, 16)), jnp.float32)
    expected = np.einsum("nij,bnlj->bli", theory.mixing_matrices(s.mux, s.mixing), x)
    np.testing.assert_allclose(s.mux.apply({"params": s.mixing}, x), expected, atol=1e-5)


@pytest.mark.parametrize("mux", ["gaussian_hadamard", "random_ortho"])
def test_the_residue_grows_with_n_and_falls_with_width(mux):
    few, many = residue.attention(jax.random.key(0), instances=(2, 4), sizes=(32,), mixers=(mux,), draws=2)
    (wide,) = residue.attention(jax.random.key(0), instances=(2,), sizes=(128,), mixers=(mux,), draws=2)
    assert 0.05 < wide.own < 0.8 * few.own < 0.8 * 0.8 * many.own
    # All together they can be read, at the price of the condition number.
    assert max(few.joint, many.joint, wide.joint) < 1e-4
    assert 1.2 < wide.condition < few.condition < many.condition


def test_mixers_without_overlap_leave_none():
    mixers = ("random_ortho_low_rank", "binary_hadamard", "binary_hadamard, epsilon=0.5")
    low_rank, binary, overlapping = residue.attention(jax.random.key(0), instances=(2,), sizes=(32,), mixers=mixers, draws=1)
    assert max(low_rank.own, binary.own) < 1e-5
    assert overlapping.own > 0.1
    same = residue.attention(jax.random.key(0), instances=(2,), sizes=(32,), mixers=mixers[2:], draws=1)
    assert same == [overlapping]


def test_a_norm_over_the_row_breaks_what_one_of_each_instance_keeps():
    alone, row = residue.norms(jax.random.key(0), instances=(1, 2), draws=1)
    assert max(alone.per_instance, row.per_instance) < 1e-5
    assert min(alone.full, row.full, row.unequal) > 0.1
    lines = residue.table([alone, row]).splitlines()
    assert lines[0] == "| instances | hidden_size | full | per_instance | unequal |"
    assert lines[2].endswith("|  |")


def test_what_does_not_fit_is_refused():
    s = setting()
    matrices = theory.mixing_matrices(s.mux, s.mixing)
    single = weights(Attention(s.spec), s.spec)
    with pytest.raises(InputError, match=r"2 instances of width 9 do not fit into a mixed row of width 16"):
        theory.subspaces(matrices, 9, jax.random.key(0))
    with pytest.raises(InputError, match=r"keeps only 8 of 16 dimensions"):
        theory.subspaces(matrices[:1], 9, jax.random.key(0))
    with pytest.raises(InputError, match=r"The next that fits is 20"):
        theory.mixed_spec(SPEC, 2, 18)
    with pytest.raises(InputError, match=r"of an instance of width 8, but the subspaces have width 4"):
        theory.attention_weights(single, theory.subspaces(matrices, 4, jax.random.key(0)), s.mixed)
    with pytest.raises(InputError, match=r"mixed_spec\(spec, 2, 16\)"):
        theory.attention_weights(single, s.places, SPEC)
    block = weights(theory.PlainBlock(s.spec), s.spec)
    with pytest.raises(
        InputError, match=r"has mlp_dim = 7; 2 instances of 12 units need 24. mixed_spec\(spec, 2, 16\) gives that"
    ):
        theory.block_weights(block, s.places, dataclasses.replace(s.mixed, mlp_dim=7))
    with pytest.raises(InputError, match="draws = 0 leaves nothing to average over"):
        residue.norms(jax.random.key(0), draws=0)
    with pytest.raises(InputError, match="Contextual looks at what it mixes"):
        theory.mixing_matrices(Contextual(s.mixed, 2), {})
    overlapping = theory.subspaces(np.stack([np.eye(16)] * 2), 8, jax.random.key(0))
    with pytest.raises(InputError, match="orthogonal subspaces"):
        theory.normed_block_weights(weights(Block(s.spec), s.spec), overlapping, s.mixed)
    with pytest.raises(InputError, match="no mixer 'ortho' to measure"):
        residue.attention(jax.random.key(0), mixers=("ortho",))
    with pytest.raises(InputError, match="instances = 0, but a mixed row holds at least one"):
        theory.mixed_spec(SPEC, 0)
    for measure in (residue.attention, residue.norms):
        for instances in ((), (2, 0)):
            with pytest.raises(InputError, match="has nothing to measure"):
                measure(jax.random.key(0), instances=instances)
    with pytest.raises(InputError, match="Use a size of at least 16"):
        residue.attention(jax.random.key(0), instances=(2,), sizes=(8,))
