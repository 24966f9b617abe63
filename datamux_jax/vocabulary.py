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
        best = logits.argmax(-1)
        token = best if keys is None else corruption.sample_tokens(keys, logits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target), best == target, token

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
