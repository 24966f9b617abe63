"""What turns a batch of tokens into a training signal: pure functions of a random key."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from datamux_jax.layers import Array


def retrieval_targets(
    key: Array, tokens_BxNxL: Array, mask_BxNxL: Array, percentage: float = 1.0
) -> tuple[Array, Array, Array]:
    """Draws what token retrieval asks for (DataMUX, section 3.3): at every position, the token of one random instance.

    Args:
      key: random key.
      tokens_BxNxL: the tokens that were fed to the network.
      mask_BxNxL: 1 at real tokens; a position whose drawn token is padding carries no loss.
      percentage: share of the remaining positions that carry a loss, each kept independently.

    Returns:
      `instance_BxL`, drawn uniformly from `0 .. N-1`; `target_BxL`, that instance's token; `weight_BxL`, 1.0 where the position
      counts.
    """
    instance_key, keep_key = jax.random.split(key)
    groups, instances, length = tokens_BxNxL.shape
    instance_BxL = jax.random.randint(instance_key, (groups, length), 0, instances)

    def drawn(values_BxNxL: Array) -> Array:
        return jnp.take_along_axis(values_BxNxL, instance_BxL[:, None], axis=1)[:, 0]

    weight = drawn(mask_BxNxL).astype(jnp.float32)
    if percentage < 1.0:
        weight = weight * jax.random.bernoulli(keep_key, percentage, weight.shape)
    return instance_BxL, drawn(tokens_BxNxL), weight
