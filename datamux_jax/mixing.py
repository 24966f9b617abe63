"""Multiplexers for inputs of any rank: `[B, N, *in] -> [B, *in]`. Table `MIXING`.

What `mux.py` does to token embeddings, for vectors, images, sequences or anything else with `multiplexed.Multiplexed`. Each instance
`i` has its own transformation `phi_i`, written for one instance and mapped with `jax.vmap`, first over instances, then over groups.
Its parameters, `instance_embedding`, are frozen unless `learned`: no gradient reaches them.
"""

from __future__ import annotations

import math
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.errors import InputError
from datamux_jax.layers import Array
from datamux_jax.mux import chunk_masks, gaussian_vectors, low_rank_matrices, orthogonal_matrices, total, transform


class Mixing(nn.Module):
    """What these multiplexers share; `N` is read from the inputs.

    Attributes:
      learned: train `instance_embedding`.
    """

    learned: bool = False
    # The optimizer goes by the name: what is called so may be frozen (`optimizer.frozen`).
    parameter = "instance_embedding"

    def instance_embedding(self, init: nn.initializers.Initializer, *shape: int) -> Array:
        """The parameter `[N, *shape]`."""
        value = cast(Array, self.param(self.parameter, init, shape))
        return value if self.learned else jax.lax.stop_gradient(value)


class Linear(Mixing):
    """What acts on all numbers of an instance at once, or on those along its last axis.

    Attributes:
      last: transform the last axis, every position likewise, as it is done with token embeddings; False: the whole instance as one
        vector, so that positions are told apart too.
    """

    last: bool = False

    def width(self, x_BxN: Array) -> int:
        """Numbers that are transformed together.

        Raises:
          InputError: instances have no axis.
        """
        if x_BxN.ndim < 3:
            raise InputError(
                f"The mux {type(self).__name__} takes inputs [groups, N, ...] with at least one axis for each instance, but got shape "
                f"{list(x_BxN.shape)}. Add an axis: x[..., None]."
            )
        return x_BxN.shape[-1] if self.last else math.prod(x_BxN.shape[2:])

    def vectors(self, x_BxN: Array, width: int) -> Array:
        """Instances as `[B, N, positions, width]`."""
        return x_BxN.reshape(*x_BxN.shape[:2], -1, width)


class GaussianHadamard(Linear):
    """`mean_i(v_i * x_i)` with one Gaussian vector `v_i` an instance (DataMUX, section 3.1, "Hadamard product").

    Attributes:
      norm: L2 norm of `v_i` at initialisation; 0: the square root of its length, unit variance.
    """

    norm: float = 0.0

    def instance_vectors(self, instances: int, width: int) -> Array:
        return self.instance_embedding(gaussian_vectors(self.norm), instances, width)

    @nn.compact
    def __call__(self, x_BxN: Array) -> Array:
        x_BxN, width = floating(x_BxN), self.width(x_BxN)
        v_NxP = self.instance_vectors(x_BxN.shape[1], width).astype(x_BxN.dtype)
        mixed = total(transform(jnp.multiply, v_NxP[:, None], self.vectors(x_BxN, width))) / x_BxN.shape[1]
        return mixed.reshape(x_BxN.shape[:1] + x_BxN.shape[2:])


class BinaryHadamard(GaussianHadamard):
    """`mean_i(m_i * x_i)`: every instance keeps a chunk of its numbers (DataMUX, "binary" ablation).

    Attributes:
      epsilon: overlap of neighbouring chunks, in chunks.
    """

    epsilon: float = 0.0

    def instance_vectors(self, instances: int, width: int) -> Array:
        _check_chunks(self, instances, width)
        return self.instance_embedding(chunk_masks(self.epsilon), instances, width)


class RandomOrtho(Linear):
    """`sum_i(W_i x_i) / sqrt(N)` with Haar-random orthogonal `W_i` (DataMUX, section 3.1, "Ortho").

    Over whole instances of `P` numbers the matrices hold `N * P * P`.
    """

    matrices = staticmethod(orthogonal_matrices)

    @nn.compact
    def __call__(self, x_BxN: Array) -> Array:
        x_BxN, instances, width = floating(x_BxN), x_BxN.shape[1], self.width(x_BxN)
        _check_chunks(self, instances, width)
        w_NxPxP = self.instance_embedding(self.matrices, instances, width, width).astype(x_BxN.dtype)
        mixed = total(transform(lambda w, x: x @ w.T, w_NxPxP, self.vectors(x_BxN, width))) / math.sqrt(instances)
        return mixed.reshape(x_BxN.shape[:1] + x_BxN.shape[2:])


class RandomOrthoLowRank(RandomOrtho):
    """`sum_i(W_i x_i) / sqrt(N)` with `W_i = U H_i^T` of rank `P // N` (DataMUX, appendix: the theoretical construction)."""

    matrices = staticmethod(low_rank_matrices)


def floating(x: Array) -> Array:
    """Bytes and truth values as float32: the parameters, cast to integers, would be zeros.

    Raises:
      InputError: wider integers, which are token ids more often than numbers.
    """
    if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize > 1:
        raise InputError(
            f"The inputs are {x.dtype} of shape {list(x.shape)}, and mixing adds numbers: ids of tokens mean nothing when they are "
            "added. Embed tokens before (x = nn.Embed(...)(ids), mux with last=True); numbers: x.astype('float32')."
        )
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _check_chunks(mux: Linear, instances: int, width: int) -> None:
    """Raises InputError if there are chunks, and fewer numbers than instances."""
    if isinstance(mux, BinaryHadamard | RandomOrthoLowRank) and instances > width:
        raise InputError(
            f"The mux {type(mux).__name__} gives each of {instances} instances a chunk of {width} numbers, which are too few. Use "
            "fewer instances, last=False, or another mux."
        )


MIXING: dict[str, type[Linear]] = {
    "gaussian_hadamard": GaussianHadamard,
    "binary_hadamard": BinaryHadamard,
    "random_ortho": RandomOrtho,
    "random_ortho_low_rank": RandomOrthoLowRank,
}
