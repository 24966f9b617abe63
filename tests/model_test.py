"""The composed network: what multiplexing must and must not change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax.build import build, count_params
from datamux_jax.errors import InputError
from datamux_jax.families import SpecialTokens
from datamux_jax.model import POOLS
from tests.conftest import fresh_params, small_config

N, L, V, C = 3, 6, 20, 4


SPECIAL = SpecialTokens(pad=1, cls=2, sep=3, mask=4, filler=5, index=19, index_cls=6, mlp_first=6)


def make(n=N, pool="mean", vocab_size=V, special=None, **changes):
    config = small_config(n, model__pool=pool, model__init_stddev=0.3, **changes)
    model = build(config, num_classes=C, vocab_size=vocab_size, max_length=L, tokens=special)
    shape = (1, n, L) if vocab_size else (1, n, L, 5)
    params = fresh_params(model, shape, "int32" if vocab_size else "float32")
    return model, params


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(2), (4, N, L), 1, V)


@pytest.fixture
def mask():
    return (jnp.arange(L) < jnp.array([[L, 4, 2]] * 4)[..., None]).astype(jnp.int32)


def logits(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask)["logits"]


@pytest.mark.parametrize("pool", POOLS)
def test_permuting_instances_with_their_parameters_permutes_the_outputs(pool, tokens, mask):
    model, params = make(pool=pool)
    order = jnp.array([2, 0, 1])
    moved = {
        **params,
        "mux": {"instance_embedding": params["mux"]["instance_embedding"][order]},
        "demux": {**params["demux"], "keys": params["demux"]["keys"][order]},
    }
    out = logits(model, params, tokens, mask)
    np.testing.assert_allclose(logits(model, moved, tokens[:, order], mask[:, order]), out[:, order], atol=2e-5)
    assert not np.allclose(out[:, 0], out[:, 1], atol=1e-3)


@pytest.mark.parametrize("pool", POOLS)
def test_changing_an_instance_changes_its_output_and_no_other_group(pool, tokens, mask):
    model, params = make(pool=pool)
    out, changed = logits(model, params, tokens, mask), logits(model, params, tokens.at[1, 1, 0].set(0), mask)
    assert np.abs(out[1, 1] - changed[1, 1]).max() > 1e-4
    np.testing.assert_allclose(np.delete(out, 1, axis=0), np.delete(changed, 1, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({}, True),
        ({"pool": "demuxed_mean"}, True),
        pytest.param({"mux__name": "contextual"}, True, marks=pytest.mark.slow),
        ({"mux__attend_padding": True}, False),
        pytest.param({"mux__name": "gaussian_attention"}, False, marks=pytest.mark.slow),
    ],
)
def test_a_row_may_be_cut_where_all_instances_are_padding(changes, equal, tokens, mask):
    model, params = make(**changes)
    mask = mask.at[:, 0, 4:].set(0)
    cut = logits(model, params, tokens[..., :4], mask[..., :4])
    assert np.allclose(logits(model, params, tokens, mask), cut, atol=1e-5) == equal


@pytest.mark.parametrize(
    ("changes", "special"),
    [
        ({"mux__name": "random_ortho"}, SPECIAL),
        ({"mux__name": "binary_hadamard", "vocab_size": 0}, None),
        ({"demux__name": "index"}, SPECIAL),
        ({"demux__name": "index", "demux__prefix": "cut"}, SPECIAL),
        ({"demux__name": "index", "model__family": "roberta"}, SPECIAL),
    ],
    ids=str,
)
def test_inference_mixes_one_instance_after_the_other_and_gets_the_same(changes, special, tokens, mask):
    model, params = make(special=special, **changes)
    inputs = tokens if model.vocab_size else jax.random.normal(jax.random.key(3), (*tokens.shape, 5))

    def encode(params, train):  # Without dropout, training computes the same in the other way.
        return model.apply({"params": params}, inputs, mask, train, method="encode")

    both = [jax.jit(encode, static_argnums=1)(params, train) for train in (False, True)]
    np.testing.assert_allclose(*both, atol=2e-6)
    programs = [str(jax.make_jaxpr(encode, 1)(params, train)) for train in (False, True)]
    embedded = rf"f32\[4,{N},\d+,{model.spec.width}\]"
    assert [bool(re.search(embedded, program)) for program in programs] == [False, True]


def test_one_instance_times_ones_is_the_encoder_with_double_embedding(tokens, mask):
    mixed_model = build(
        small_config(1, mux__name="gaussian_hadamard", demux__name="rsa", model__init_stddev=0.3),
        num_classes=C,
        vocab_size=V,
        max_length=L,
    )
    params = fresh_params(mixed_model, (1, 1, L))
    params["mux"] = {"instance_embedding": jnp.ones_like(params["mux"]["instance_embedding"])}
    h = mixed_model.apply({"params": params}, tokens[:, :1], mask[:, :1], method="encode")

    def plainly(module, ids):
        twice = module.embeddings.refine(module.embeddings(ids))
        return module.backbone(twice)

    expected = mixed_model.apply({"params": params}, tokens[:, 0], method=plainly)
    np.testing.assert_allclose(h, expected, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_the_plain_network_never_reads_padding(pool, tokens, mask):
    model, params = make(1, pool=pool)
    own, real = tokens[:, 2:], mask[:, 2:]
    changed = jnp.where(real == 1, own, 0)
    np.testing.assert_allclose(logits(model, params, own, real), logits(model, params, changed, real), atol=1e-5)


def test_the_plain_network_has_neither_mux_nor_demux():
    _, params = make(1)
    assert set(params) == {"embeddings", "backbone", "classifier"}
    _, params = make(1, retrieval_loss_coeff=0.1)
    assert set(params) == {"embeddings", "backbone", "classifier", "decoder"}


def test_retrieval_reads_the_chosen_instance(tokens, mask):
    model, params = make()
    h = model.apply({"params": params}, tokens, mask, method="encode")
    planes = [model.apply({"params": params}, h, jnp.full((4, L), i), method="retrieve") for i in range(N)]
    chosen = jax.random.randint(jax.random.key(3), (4, L), 0, N)
    out = model.apply({"params": params}, h, chosen, method="retrieve")
    assert out.shape == (4, L, V)
    for b, j in np.ndindex(4, L):
        np.testing.assert_allclose(out[b, j], planes[chosen[b, j]][b, j], atol=1e-5)


def test_features_instead_of_tokens():
    model, params = make(vocab_size=0)
    out = model.apply({"params": params}, jnp.ones((2, N, L, 5)), jnp.ones((2, N, L), jnp.int32))
    assert out["logits"].shape == (2, N, C)
    assert "retrieved" not in out


def test_another_number_of_instances_is_refused(tokens, mask):
    model, params = make()
    with pytest.raises(InputError, match=r"2 instances a group, but this network mixes 3"):
        logits(model, params, tokens[:, :2], mask[:, :2])


@pytest.mark.parametrize("key", ["mux.name", "demux.name", "model.backbone", "model.pool"])
def test_unknown_names_list_the_choices(key):
    config = small_config(2)
    config.update_from_flattened_dict({key: "nonsense"})
    with pytest.raises(InputError, match=r"'nonsense' does not exist. Choose one of: \w+"):
        build(config, num_classes=C, vocab_size=V, max_length=L)


def test_a_mixed_network_costs_few_more_parameters():
    """Mixing vectors and keys grow with N by E + D each; nothing else does."""
    two, four = (count_params(make(n)[1]) for n in (2, 4))
    assert four - two == 2 * (16 + 16)


def test_bfloat16_computes_in_bfloat16_and_reads_out_in_float32(tokens, mask):
    model, params = make(dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert model.apply({"params": params}, tokens, mask, method="encode").dtype == jnp.bfloat16
    assert logits(model, params, tokens, mask).dtype == jnp.float32


def test_rows_longer_than_the_position_table_are_refused(tokens, mask):
    model, params = make(model__max_positions=L)
    longer = jnp.concatenate([tokens, tokens], axis=2)
    with pytest.raises(InputError, match=f"Rows of {2 * L} positions.*the position table has {L} rows"):
        logits(model, params, longer, jnp.ones_like(longer))


def test_the_index_prefix_needs_tokens():
    with pytest.raises(InputError, match="puts index tokens before every text, but the inputs are feature vectors"):
        make(demux__name="index", vocab_size=0)


def test_a_tied_decoder_needs_equal_widths():
    with pytest.raises(InputError, match=r"tied to the word embeddings.*tied_decoder = False"):
        make(model__embedding_size=8)
    _, params = make(model__embedding_size=8, model__tied_decoder=False)
    assert params["decoder"]["kernel"].shape == (16, V)
    assert params["mux"]["instance_embedding"].shape == (N, 8)
