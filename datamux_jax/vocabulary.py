"""Cross-entropy over the vocabulary, in pieces: `[B, P, V]` logits are the largest arrays that training makes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from datamux_jax import corruption, sharding
from datamux_jax.layers import Array
from datamux_jax.model import MultiplexedTransformer, call

FLOAT32 = 4
COPIES = 2  # The backward pass holds logits and their gradient together.


def piece_size(model: MultiplexedTransformer, groups: int, positions: int) -> int:
    """Positions of every group whose logits are computed at a time: a device holds `model.logits_mib` MiB of them and their gradient.

    One at least, so with many groups a device and a large vocabulary it holds more.

    Args:
      model: the network.
      groups: `B`, of all devices.
      positions: `P`, of a group.
    """
    each = sharding.held(groups) * model.vocab_size * FLOAT32 * COPIES
    return min(positions, max(1, int(model.logits_mib * 2**20 // each)))


def cross_entropy(
    model: MultiplexedTransformer, params: Any, states_BxPxD: Array, target_BxP: Array, sample_keys_BxP: Array | None = None
) -> tuple[Array, Array, Array]:
    """Cross-entropy of the decoder's logits, of which only a piece exists at a time.

    More than one piece costs the decoder's product a second time, in the backward pass. The numbers do not depend on the pieces.

    Args:
      model: the network.
      params: its parameters.
      states_BxPxD: demultiplexed states of the positions asked for.
      target_BxP: their tokens.
      sample_keys_BxP: keys to draw a token from each position's distribution; None: the likeliest one is taken.

    Returns:
      `(loss, right, token)`, all `[B, P]`: the cross-entropy, whether the likeliest token is the target, and the drawn token.
    """

    def piece(params: Any, states: Array, target: Array, keys: Array | None) -> tuple[Array, Array, Array]:
        logits = call(model, params, "decode", states)
        token = logits.argmax(-1) if keys is None else corruption.sample_tokens(keys, logits)
        return *jax.lax.platform_dependent(logits, target, cpu=scored, default=scored_at_once), token

    groups, positions = target_BxP.shape
    size = piece_size(model, groups, positions)
    arrays = (states_BxPxD, target_BxP, sample_keys_BxP)
    if size == positions:
        return piece(params, *arrays)
    count = math.ceil(positions / size)
    # The last piece repeats the last position.
    index = jnp.minimum(jnp.arange(count * size), positions - 1).reshape(count, size)
    again = jax.checkpoint(piece, prevent_cse=False)
    _, outputs = jax.lax.scan(lambda carry, at: (carry, again(params, *jax.tree.map(lambda x: x[:, at], arrays))), None, index)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(groups, -1)[:, :positions], outputs)


def scored(logits: Array, target: Array) -> tuple[Array, Array]:
    """Cross-entropy `[...]` of logits `[..., V]`, and whether the likeliest token is the target."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target), logits.argmax(-1) == target


@jax.custom_vjp
def scored_at_once(logits: Array, target: Array) -> tuple[Array, Array]:
    """As `scored`, in one pass over the logits after that for their maximum: for what is bound by memory, not by operations."""
    return _scored_forward(logits, target)[0]


def _scored_forward(logits: Array, target: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    last = logits.ndim - 1
    token = jax.lax.broadcasted_iota(target.dtype, logits.shape, last)
    own = jnp.take_along_axis(logits, target[..., None], axis=-1)
    # Of equal logits the first one is the likeliest, as of `argmax`.
    ahead = (logits > own) | ((logits == own) & (token < target[..., None]))
    largest = logits.max(-1, keepdims=True)
    zero = jnp.zeros((), logits.dtype)
    total, better = jax.lax.reduce(
        (jnp.exp(logits - largest), ahead.astype(logits.dtype)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
        (last,),
    )
    log_total = jnp.log(total)[..., None] + largest
    right = (better == 0) & ~jnp.isnan(own[..., 0])  # Nothing is ahead of what is not a number.
    return ((log_total - own)[..., 0], right), (logits, target, log_total)


def _scored_backward(saved: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, None]:
    logits, target, log_total = saved
    token = jax.lax.broadcasted_iota(target.dtype, logits.shape, logits.ndim - 1)
    found = jnp.exp(logits - log_total) - (token == target[..., None])
    return found * gradients[0][..., None], None


scored_at_once.defvjp(_scored_forward, _scored_backward)
