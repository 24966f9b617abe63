"""The RSA demultiplexer against its formula (MUX-PLMs, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax.demux import MLP, RSA, Index
from datamux_jax.errors import InputError
from datamux_jax.families import published_tokens
from datamux_jax.layers import Spec

B, N, L, D = 2, 3, 5, 8
SPEC = Spec(hidden_size=D, num_layers=1, num_heads=2, mlp_dim=16, dropout_rate=0.0, init_stddev=0.5)


@pytest.fixture
def h():
    return jax.random.normal(jax.random.key(1), (B, L, D))


def make(form="paper", num_layers=2, dropout_rate=0.0):
    spec = Spec(**{**vars(SPEC), "dropout_rate": dropout_rate})
    demux = RSA(spec, N, num_layers, form)
    params = nn.unbox(demux.init(jax.random.key(0), jnp.zeros((1, L, D)))["params"])
    other = nn.unbox(demux.init(jax.random.key(0), jnp.zeros((1, L, D)), stack="retrieval")["params"])
    return demux, {**other, **params}


def gelu(x):
    return np.asarray(jax.nn.gelu(x, approximate=False))


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + SPEC.layer_norm_eps)
    return x * np.asarray(p["scale"]) + np.asarray(p["bias"])


def linear(p, x):
    return x @ np.asarray(p["kernel"]) + np.asarray(p.get("bias", 0))


def reference(params, h, form, num_layers, stack):
    """One instance and one position at a time, on the concatenation `[k_i ; h]`, as the papers write it."""
    dense_1 = np.concatenate([np.asarray(params["key_in"]["kernel"]), np.asarray(params["state_in"]["kernel"])])
    released = form != "paper" and stack == "task"
    plain = form == "bert" and stack == "retrieval"  # Two layers, no residuals.
    out = np.zeros((B, N, L, D))
    for b, i, j in np.ndindex(B, N, L):
        x = np.concatenate([np.asarray(params["keys"])[i], np.asarray(h)[b, j]])
        x = gelu(x @ dense_1 + np.asarray(params["state_in"]["bias"]))
        x = x if released else norm(params["norms_0"], x)
        for k in range(1, 2 if plain else num_layers - 1 if released else num_layers):
            y = gelu(linear(params[f"hidden_{k - 1}"], x))
            x = (0 if plain else x) + (y if released else norm(params[f"norms_{k}"], y))
        out[b, i, j] = (0 if plain else x) + norm(params[f"{stack}_norm"], gelu(linear(params[f"{stack}_out"], x)))
    return out


@pytest.mark.parametrize("stack", ["task", "retrieval"])
@pytest.mark.parametrize(
    ("form", "num_layers"),
    [("paper", 1), ("paper", 3), ("bert", 2), ("bert", 3), ("electra", 1), ("electra", 2), ("electra", 3)],
)
def test_equals_the_formula(h, form, num_layers, stack):
    demux, params = make(form, num_layers)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(5), p.shape), params)
    out = demux.apply({"params": params}, h, stack=stack)
    np.testing.assert_allclose(out, reference(params, h, form, num_layers, stack), atol=2e-5)


def test_selected_pairs_equal_the_full_result(h):
    demux, params = make()
    instance = jnp.array([[0, 2, 1, 1], [2, 2, 0, 1]])
    position = jnp.array([[4, 0, 1, 4], [3, 2, 2, 0]])
    full = demux.apply({"params": params}, h)
    chosen = demux.apply({"params": params}, h, (instance, position))
    for b, p in np.ndindex(2, 4):
        np.testing.assert_allclose(chosen[b, p], full[b, instance[b, p], position[b, p]], atol=1e-6)


def test_permuting_keys_permutes_instances(h):
    demux, params = make()
    order = jnp.array([2, 0, 1])
    out = demux.apply({"params": params}, h)
    permuted = demux.apply({"params": {**params, "keys": params["keys"][order]}}, h)
    np.testing.assert_allclose(permuted, out[:, order], atol=1e-6)


def test_the_shared_half_is_computed_once(h):
    """The first dense layer costs two small products: nothing `2D` wide exists, and `C h` has no instance axis."""
    demux, params = make(num_layers=1)
    jaxpr = jax.make_jaxpr(lambda p, h: demux.apply({"params": p}, h))(params, h)
    products = [eqn for eqn in jax.tree.leaves(list(_equations(jaxpr.jaxpr))) if eqn.primitive.name == "dot_general"]
    sizes = sorted(int(np.prod(eqn.outvars[0].aval.shape)) for eqn in products)
    assert sizes == [N * D, B * L * D, B * N * L * D]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_dropout_differs_between_instances(h):
    demux, params = make("bert", dropout_rate=0.5)
    params = {**params, "keys": jnp.zeros_like(params["keys"])}
    out = demux.apply({"params": params}, h, train=True, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(out[:, 0], out[:, 1])
    assert not np.allclose(out[0], demux.apply({"params": params}, h, train=True, rngs={"dropout": jax.random.key(1)})[0])


@pytest.mark.parametrize("stack", ["task", "retrieval"])
@pytest.mark.parametrize("kind", [Index, MLP])
def test_index_and_mlp_select_and_pool(h, kind, stack):
    """Selected pairs equal the full result, also of states that are not the row itself."""
    demux = kind(SPEC, N)
    both = [nn.unbox(demux.init(jax.random.key(0), h, stack=s)["params"]) for s in ("task", "retrieval")]
    params = {**both[1], **both[0]}
    full = demux.apply({"params": params}, h, stack=stack)
    instance, position = jnp.array([[0, 2, 1], [2, 2, 0]]), jnp.array([[4, 0, 1], [3, 2, 0]])
    chosen = demux.apply({"params": params}, h, (instance, position), stack=stack)
    for b, p in np.ndindex(2, 3):
        np.testing.assert_allclose(chosen[b, p], full[b, instance[b, p], position[b, p]], atol=1e-6)
    part = demux.apply({"params": params}, h[:, 3:], row=h, stack=stack)
    np.testing.assert_allclose(part, full[:, :, 3:], atol=1e-6)


def test_index_equals_the_formula_on_the_concatenation(h):
    demux = Index(SPEC, N)
    params = nn.unbox(demux.init(jax.random.key(0), h)["params"])
    weight = np.concatenate([np.asarray(params["task"]["key_in"]["kernel"]), np.asarray(params["task"]["state_in"]["kernel"])])
    out = demux.apply({"params": params}, h)
    for b, i, j in np.ndindex(B, N, L):
        both = np.concatenate([np.asarray(h)[b, i], np.asarray(h)[b, j]])
        expected = norm(params["task"]["norm"], gelu(both @ weight + np.asarray(params["task"]["state_in"]["bias"])))
        np.testing.assert_allclose(out[b, i, j], expected, atol=1e-5)


def test_prefixes_of_the_published_families():
    text = jnp.arange(1, 9).reshape(1, 2, 4)

    def fed(kind, family, size, **changes):
        return np.asarray(kind(SPEC, 2, tokens=published_tokens(family, size, 2), **changes).prefix(text))[0].tolist()

    assert fed(Index, "bert", 30522) == [[678, 680, 101, 1, 2, 3, 4], [680, 677, 101, 5, 6, 7, 8]]
    assert fed(Index, "roberta", 50265) == [[50263, 50000, 49923, 1, 2, 3, 4], [50000, 50262, 49923, 5, 6, 7, 8]]
    assert fed(Index, "electra", 30522, cut=True) == [[678, 680, 101, 1], [680, 677, 101, 5]]
    assert fed(RSA, "bert", 30522) == [[101, 2, 3, 4], [101, 6, 7, 8]]
    assert fed(RSA, "electra", 30522, keep_first=True) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert fed(MLP, "roberta", 50265) == [[49923, 2, 3, 4], [49923, 6, 7, 8]]


def test_a_vocabulary_too_small_for_the_prefix_is_refused():
    with pytest.raises(InputError, match=r"token ids .*50000.*the vocabulary has 500"):
        published_tokens("roberta", 500, 2, demux="index")
    with pytest.raises(InputError, match="token ids -1,"):
        published_tokens("bert", 30522, 680, demux="index")
    with pytest.raises(InputError, match="token ids 49923 "):
        published_tokens("roberta", 500, 2, demux="mlp")
