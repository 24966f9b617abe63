"""Masking, replacing and drawing: proportions, and what is never touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import corruption
from datamux_jax.families import SpecialTokens

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, mlp_first=1, filler=4, index=9, index_cls=1)
B, N, L, V = 40, 4, 64, 1000
KEYS = jax.random.split(jax.random.key(1), B)


@pytest.fixture
def tokens():
    ids = jax.random.randint(jax.random.key(0), (B, N, L), 10, V)
    ids = ids.at[..., 0].set(TOKENS.cls).at[..., -1].set(TOKENS.sep)
    return ids.at[:, 1, 40:].set(TOKENS.pad)


@pytest.fixture
def special(tokens):
    return np.isin(tokens, [TOKENS.pad, TOKENS.cls, TOKENS.sep])


def test_mlm_masks_15_percent_80_10_10(tokens, special):
    masked, chosen = corruption.mask_for_mlm(KEYS, tokens, TOKENS, V, 0.15)
    masked, chosen, tokens = map(np.asarray, (masked, chosen, tokens))
    assert not chosen[special].any()
    np.testing.assert_array_equal(masked[~chosen], tokens[~chosen])
    np.testing.assert_allclose(chosen[~special].mean(), 0.15, atol=0.01)
    np.testing.assert_allclose((masked[chosen] == TOKENS.mask).mean(), 0.8, atol=0.03)
    np.testing.assert_allclose((masked[chosen] == tokens[chosen]).mean(), 0.1, atol=0.02)
    other = masked[chosen & (masked != TOKENS.mask) & (masked != tokens)]
    assert len(set(other)) > 0.7 * len(other), "random tokens differ"


def test_electra_masks_85_percent_of_the_chosen_and_keeps_the_rest(tokens, special):
    masked, chosen = map(np.asarray, corruption.mask_for_electra(KEYS, tokens, TOKENS, 0.15))
    assert not chosen[special].any()
    np.testing.assert_allclose(chosen[~special].mean(), 0.15, atol=0.01)
    np.testing.assert_allclose((masked[chosen] == TOKENS.mask).mean(), 0.85, atol=0.03)
    unmasked = masked != TOKENS.mask
    np.testing.assert_array_equal(masked[unmasked], np.asarray(tokens)[unmasked])


def test_no_more_is_chosen_than_there_is_room_for(tokens):
    chosen = np.asarray(corruption.choose_tokens(KEYS, jnp.full((B, N, L), 20), TOKENS, 0.15))
    assert chosen.sum((1, 2)).max() <= corruption.capacity(N * L, 0.15) < N * L
    assert chosen.sum(2).max() <= corruption.capacity(L, 0.15) < L
    assert corruption.capacity(L, 0.99) == L


def test_chosen_tokens_are_listed_once_each():
    chosen = jax.random.bernoulli(jax.random.key(0), 0.3, (3, 2, 10))
    room = int(chosen.sum((1, 2)).max()) + 2
    instance, position, weight = corruption.gather_chosen(chosen, room)
    assert instance.shape == position.shape == weight.shape == (3, room)
    for b in range(3):
        listed = [(int(i), int(j)) for i, j, w in zip(instance[b], position[b], weight[b], strict=True) if w]
        assert sorted(listed) == [tuple(pair) for pair in np.argwhere(chosen[b])]


def test_sampling_follows_the_logits():
    logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    drawn = np.asarray(corruption.sample_tokens(corruption.split(KEYS, 125).T, jnp.broadcast_to(logits, (B, 125, 3)))).ravel()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 5000, [0.1, 0.6, 0.3], atol=0.03)
    gradient = jax.grad(lambda x: corruption.sample_tokens(KEYS[:1, None], x[None, None]).astype("float32").sum())(logits)
    assert not gradient.any()
