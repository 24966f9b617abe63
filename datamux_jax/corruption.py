"""What turns a batch of tokens into a training signal: pure functions of a random key."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from datamux_jax.families import SpecialTokens
from datamux_jax.layers import Array


def draw_instances(key: Array, groups: int, length: int, instances: int) -> Array:
    """For every position of every mixed row one instance, uniform in `0 .. N-1`: `[B, L]`."""
    return jax.random.randint(key, (groups, length), 0, instances)


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


def choose_tokens(key: Array, tokens_BxNxL: Array, special: SpecialTokens, rate: float) -> Array:
    """Which tokens MLM and ELECTRA ask for: each that is no special token, with probability `rate`; boolean `[B, N, L]`.

    An instance and a group have at most `capacity` of them; of those that are drawn beyond, the last ones are let go.
    """
    ordinary = (tokens_BxNxL != special.pad) & (tokens_BxNxL != special.cls) & (tokens_BxNxL != special.sep)
    chosen = jax.random.bernoulli(key, rate, tokens_BxNxL.shape) & ordinary
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


def mask_for_mlm(key: Array, tokens_BxNxL: Array, special: SpecialTokens, vocab_size: int, rate: float) -> tuple[Array, Array]:
    """BERT's masking: of the chosen tokens 80% become [MASK], 10% a random token, 10% stay.

    Returns:
      The masked tokens, and which were chosen, both `[B, N, L]`.
    """
    choice_key, kind_key, token_key = jax.random.split(key, 3)
    chosen = choose_tokens(choice_key, tokens_BxNxL, special, rate)
    kind = jax.random.uniform(kind_key, tokens_BxNxL.shape)
    random = jax.random.randint(token_key, tokens_BxNxL.shape, 0, vocab_size, tokens_BxNxL.dtype)
    put = jnp.where(kind < 0.8, special.mask, jnp.where(kind < 0.9, random, tokens_BxNxL))
    return jnp.where(chosen, put, tokens_BxNxL).astype(tokens_BxNxL.dtype), chosen


def mask_for_electra(
    key: Array, tokens_BxNxL: Array, special: SpecialTokens, rate: float, share: float = 0.85
) -> tuple[Array, Array]:
    """MUX-ELECTRA's masking: a `share` of the chosen tokens become [MASK], the others stay, but count for the generator.

    Returns:
      The masked tokens, and which were chosen, both `[B, N, L]`.
    """
    choice_key, kind_key = jax.random.split(key)
    chosen = choose_tokens(choice_key, tokens_BxNxL, special, rate)
    masked = chosen & jax.random.bernoulli(kind_key, share, tokens_BxNxL.shape)
    return jnp.where(masked, special.mask, tokens_BxNxL).astype(tokens_BxNxL.dtype), chosen


def sample_tokens(key: Array, logits: Array) -> Array:
    """One token from each row of logits, `[..., V] -> [...]`: the largest after Gumbel noise (temperature 1). No gradient."""
    return jax.random.categorical(key, jax.lax.stop_gradient(logits))
