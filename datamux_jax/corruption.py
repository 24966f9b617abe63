"""What turns a batch of tokens into a training signal: pure functions of random keys.

Every group draws from a key of its own, `keys_B`. What is drawn for a group therefore depends neither on how a batch is split into
micro-batches nor on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from datamux_jax.families import SpecialTokens
from datamux_jax.layers import Array


def group_keys(key: Array, groups: int) -> Array:
    """One key a group, `[B]`, from a single key; keys of groups pass unchanged."""
    return key if key.ndim else jax.random.split(key, groups)


def split(keys_B: Array, count: int) -> Array:
    """`count` new keys for every group: `[count, B]`."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys_B)


def draw(keys_B: Array, sample: Callable[[Array, tuple[int, ...]], Array], shape: tuple[int, ...]) -> Array:
    """`sample(key, shape)` for every group: `[B, *shape]`."""
    return jax.vmap(lambda key: sample(key, shape))(keys_B)


def draw_instances(keys_B: Array, length: int, instances: int) -> Array:
    """For every position of every mixed row one instance, uniform in `0 .. N-1`: `[B, L]`."""
    return draw(keys_B, lambda key, shape: jax.random.randint(key, shape, 0, instances), (length,))


def draw_positions(keys_B: Array, length: int, count: int) -> Array:
    """For every mixed row `count` different positions below `length`: `[B, count]`."""
    return draw(keys_B, lambda key, shape: jax.random.permutation(key, length)[: shape[0]], (count,))


def draw_tokens(keys_B: Array, tokens_BxNxL: Array, vocab_size: int) -> Array:
    """A random token, uniform in the vocabulary, for every one of the given: `[B, N, L]`."""

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.randint(key, shape, 0, vocab_size, tokens_BxNxL.dtype)

    return draw(keys_B, sample, tokens_BxNxL.shape[1:])


def flips(keys_B: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """True with probability `rate`, independently: boolean `[B, *shape]`."""
    return draw(keys_B, lambda key, shape: jax.random.bernoulli(key, rate, shape), shape)


def retrieval_targets(tokens_BxNxL: Array, instance_BxL: Array, *, pad: int | None = None) -> tuple[Array, Array]:
    """What token retrieval asks for (DataMUX, section 3.3): at every position, the token of one drawn instance.

    Args:
      tokens_BxNxL: the tokens that the network was fed.
      instance_BxL: the drawn instances.
      pad: a position whose drawn token is this one carries no loss; None: padding counts (published pre-training).

    Returns:
      `target_BxL`, the drawn instance's token; `weight_BxL`, 1.0 where the position counts.
    """
    target = jnp.take_along_axis(tokens_BxNxL, instance_BxL[:, None], axis=1)[:, 0]
    counts = jnp.ones(target.shape, bool) if pad is None else target != pad
    return target, counts.astype(jnp.float32)


def choose_tokens(keys_B: Array, tokens_BxNxL: Array, special: SpecialTokens, rate: float) -> Array:
    """Which tokens MLM and ELECTRA ask for: each that is no special token, with probability `rate`; boolean `[B, N, L]`.

    An instance and a group have at most `capacity` of them; of those that are drawn beyond, the last ones are let go.
    """
    ordinary = (tokens_BxNxL != special.pad) & (tokens_BxNxL != special.cls) & (tokens_BxNxL != special.sep)
    chosen = flips(keys_B, rate, tokens_BxNxL.shape[1:]) & ordinary
    groups, instances, length = tokens_BxNxL.shape
    chosen &= jnp.cumsum(chosen, axis=2) <= capacity(length, rate)
    so_far = jnp.cumsum(chosen.reshape(groups, -1), axis=1).reshape(chosen.shape)
    return chosen & (so_far <= capacity(instances * length, rate))


def capacity(positions: int, rate: float) -> int:
    """How many of `positions` tokens are given room in the logits: the mean number chosen and four standard deviations.

    Vocabulary logits need a shape known beforehand; one group in 30,000 draws more.
    """
    return min(positions, math.ceil(positions * rate + 4 * math.sqrt(positions * rate * (1 - rate))))


def gather_chosen(chosen_BxNxL: Array, room: int) -> tuple[Array, Array, Array]:
    """Lists the chosen tokens of each group.

    Args:
      chosen_BxNxL: boolean.
      room: `P`, length of the list; more are not listed.

    Returns:
      `instance_BxP`, `position_BxP`, and `weight_BxP`, which is 0.0 at entries that only fill up the list.
    """
    groups, instances, length = chosen_BxNxL.shape
    present, index = jax.lax.top_k(chosen_BxNxL.reshape(groups, instances * length).astype(jnp.float32), room)
    return index // length, index % length, present


def mask_for_mlm(
    keys_B: Array, tokens_BxNxL: Array, special: SpecialTokens, vocab_size: int, rate: float
) -> tuple[Array, Array]:
    """BERT's masking: of the chosen tokens 80% become [MASK], 10% a random token, 10% stay.

    Returns:
      The masked tokens, and which were chosen, both `[B, N, L]`.
    """
    choice_keys, kind_keys, token_keys = split(keys_B, 3)
    chosen = choose_tokens(choice_keys, tokens_BxNxL, special, rate)
    kind = draw(kind_keys, jax.random.uniform, tokens_BxNxL.shape[1:])
    random = draw_tokens(token_keys, tokens_BxNxL, vocab_size)
    put = jnp.where(kind < 0.8, special.mask, jnp.where(kind < 0.9, random, tokens_BxNxL))
    return jnp.where(chosen, put, tokens_BxNxL).astype(tokens_BxNxL.dtype), chosen


def mask_for_electra(
    keys_B: Array, tokens_BxNxL: Array, special: SpecialTokens, rate: float, share: float = 0.85
) -> tuple[Array, Array]:
    """MUX-ELECTRA's masking: a `share` of the chosen tokens become [MASK], the others stay, but count for the generator.

    Returns:
      The masked tokens, and which were chosen, both `[B, N, L]`.
    """
    choice_keys, kind_keys = split(keys_B, 2)
    chosen = choose_tokens(choice_keys, tokens_BxNxL, special, rate)
    masked = chosen & flips(kind_keys, share, tokens_BxNxL.shape[1:])
    return jnp.where(masked, special.mask, tokens_BxNxL).astype(tokens_BxNxL.dtype), chosen


def sample_tokens(keys_BxP: Array, logits_BxPxV: Array) -> Array:
    """One token from each row of logits, `[B, P]`: the largest after Gumbel noise (temperature 1). No gradient."""
    return jax.vmap(jax.vmap(jax.random.categorical))(keys_BxP, jax.lax.stop_gradient(logits_BxPxV))
