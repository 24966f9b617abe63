"""Multiplexers: `N` embedded instances become one, `[B, N, L, E] -> [B, L, E]`. Table `MUX`.

Each instance `i` has its own fixed transformation `phi_i`, the same at every position (DataMUX, section 3.1). It is written
for one instance and mapped with `jax.vmap`, first over instances, then over groups.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.layers import Array, parameter


def gaussian_vectors(norm: float) -> nn.initializers.Initializer:
    """Initialiser: Gaussian vectors along the last axis, each scaled to the L2 norm `norm`; 0 means `sqrt(E)`, unit variance.

    Scaling to an exact norm follows the published code; unit variance keeps a mixed embedding as large as a plain one, which
    matters when training starts from scratch: with norm 1 the added position embeddings drown the mixture.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        v = jax.random.normal(key, shape, dtype)
        scale = norm or math.sqrt(shape[-1])
        return v * (scale / jnp.linalg.norm(v, axis=-1, keepdims=True))

    return init


class GaussianHadamard(nn.Module):
    """`x = mean_i(v_i * x_i)` with one Gaussian vector `v_i` an instance (DataMUX, section 3.1, "Hadamard product").

    Attributes:
      num_instances: `N`.
      features: `E`.
      norm: L2 norm of each `v_i` at initialisation; 0 means `sqrt(E)`.
      learned: train `v_i`. Otherwise no gradient reaches it and the optimizer leaves it alone.
      dtype: of the computation.
    """

    num_instances: int
    features: int
    norm: float = 1.0
    learned: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BxNxLxE: Array, mask_BxNxL: Array | None = None, train: bool = False) -> Array:
        del mask_BxNxL, train  # Padding of one instance is mixed like content; only contextual multiplexers look.
        v_NxE = parameter(
            self, "instance_embedding", gaussian_vectors(self.norm), ("instances", "embed"), (self.num_instances, self.features)
        )
        if not self.learned:
            v_NxE = jax.lax.stop_gradient(v_NxE)

        def phi(v_E: Array, x_LxE: Array) -> Array:
            return v_E * x_LxE

        over_instances = jax.vmap(phi)
        over_groups = jax.vmap(over_instances, in_axes=(None, 0))
        return over_groups(v_NxE.astype(self.dtype), x_BxNxLxE).mean(axis=1)


# `none` is the plain network: one instance, mixed with nothing. `model.py` then leaves mixing and unmixing out altogether.
MUX = {"none": None, "gaussian_hadamard": GaussianHadamard}
