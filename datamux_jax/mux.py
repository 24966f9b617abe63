"""Multiplexers: `N` embedded instances become one, `[B, N, L, E] -> [B, L, E]`. Table `MUX`.

Each instance `i` has its own transformation `phi_i`, the same at every position (DataMUX, section 3.1). It is written for one
instance and mapped with `jax.vmap`, first over instances, then over groups. Its parameters, `instance_embedding`, are frozen unless
`learned`: no gradient reaches them, and the optimizer leaves them alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.errors import InputError
from datamux_jax.layers import Array, Block, Spec, dense, gelu, layer_norm, parameter


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


def chunk_masks(epsilon: float) -> nn.initializers.Initializer:
    """Initialiser: mask `i` of `[N, E]` is one on chunk `i` of `E // N` dimensions, the last chunk ending at `E`.

    With overlap `epsilon` every inner boundary moves out by `epsilon / 2` of a chunk on both sides, cut to whole dimensions.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        del key
        instances, features = shape
        chunk = features // instances
        masks = jnp.zeros(shape, dtype)
        for i in range(instances):
            start = int(i * chunk - epsilon / 2 * chunk) if i else 0
            end = int((i + 1) * chunk + epsilon / 2 * chunk) if i < instances - 1 else features
            masks = masks.at[i, max(start, 0) : end].set(1.0)
        return masks

    return init


def orthogonal_matrices(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Initialiser: `[N, E, E]` independent Haar-random orthogonal matrices."""
    return jax.random.orthogonal(key, shape[-1], shape[:1], dtype)


def rotation(key: Array, features: int, dtype: jnp.dtype = jnp.float32) -> Array:
    """A Haar-random matrix of SO(`features`)."""
    q = jax.random.orthogonal(key, features, (), dtype)
    return q.at[:, 0].multiply(jnp.linalg.slogdet(q)[0])


def low_rank_matrices(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Initialiser: `W_i = U H_i^T`, where `H_i` keeps block `i` of the columns of `H`, `E // N` wide; `U`, `H` Haar-random in SO(E).

    The instances' transformed embeddings then lie in subspaces of which none shares a direction of the input with another.
    """

    instances, features = shape[:2]
    chunk = features // instances
    u, h = (rotation(k, features, dtype) for k in jax.random.split(key))
    kept = jnp.arange(features) // chunk == jnp.arange(instances)[:, None]
    return jnp.einsum("ab,cb,nb->nac", u, h, kept.astype(dtype))


class Multiplexer(nn.Module):
    """What all multiplexers share.

    Attributes:
      spec: sizes; instances are mixed at `spec.width`, `E`.
      num_instances: `N`.
      norm: L2 norm of Gaussian vectors at initialisation; 0 means `sqrt(E)`.
      epsilon: overlap of neighbouring chunks of `binary_hadamard`, in chunks.
      learned: train `instance_embedding`.
      mask_instances: attention over instances (contextual) leaves out those that are padding at a position, as published code does
        in sequence classification; otherwise it attends to all, as in token classification and MLM.
    """

    spec: Spec
    num_instances: int
    norm: float = 1.0
    epsilon: float = 0.0
    learned: bool = False
    mask_instances: bool = True

    def instance_embedding(self, init: nn.initializers.Initializer, *shape: int) -> Array:
        """The parameter `[N, *shape]`, in the dtype of the computation."""
        axes = ("instances", "embed", None)[: len(shape) + 1]
        value = parameter(self, "instance_embedding", init, axes, (self.num_instances, *shape))
        return (value if self.learned else jax.lax.stop_gradient(value)).astype(self.spec.dtype)

    def gaussians(self) -> Array:
        return self.instance_embedding(gaussian_vectors(self.norm), self.spec.width)


def transform(phi: Callable[[Any, Array], Array], parameters: Any, x_BxNxLxE: Array) -> Array:
    """`phi(parameter of an instance, x_LxE)` mapped over instances, then groups: `[B, N, L, E]`."""
    over_instances = jax.vmap(phi)
    return jax.vmap(over_instances, in_axes=(None, 0))(parameters, x_BxNxLxE)


def total(x_BxNxLxE: Array) -> Array:
    """Sum over instances, `[B, L, E]`.

    Written as additions: XLA's CPU backend does not vectorise a reduction over an axis in the middle, which cost a third of the
    time of embedding and mixing at N = 8. Elsewhere both compile to the same.
    """
    return functools.reduce(jnp.add, [x_BxNxLxE[:, i] for i in range(x_BxNxLxE.shape[1])])


def hadamard(v_E: Array, x_LxE: Array) -> Array:
    return v_E * x_LxE


def rotate(w_ExE: Array, x_LxE: Array) -> Array:
    return x_LxE @ w_ExE.T


class Pointwise(Multiplexer):
    """Multiplexers that look at one position at a time: `scale * sum_i phi(parameter_i, x_i)`."""

    @staticmethod
    def phi(parameter: Array, x_LxE: Array, /) -> Array:
        """The transformation of one instance."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """By what the sum over instances is multiplied."""
        return 1 / self.num_instances

    def parameters(self) -> Array:
        """One parameter an instance, `[N, ...]`."""
        raise NotImplementedError

    def __call__(self, x_BxNxLxE: Array, mask_BxNxL: Array | None = None, train: bool = False) -> Array:
        del mask_BxNxL, train  # Padding of one instance is mixed like content; only contextual multiplexers look.
        return total(transform(self.phi, self.parameters(), x_BxNxLxE)) * self.scale

    def mix(self, embed: Callable[[nn.Module, Array], Array], module: nn.Module, inputs_BxNxL: Array) -> Array:
        """Embeds and mixes one instance after the other, `[B, L, E]`: no `[B, N, L, E]` ever exists.

        At N = 40 that is 2 to 6 times as fast on CPU, where the temporary leaves the caches. Not for training: the backward pass
        would add up a gradient of the whole embedding table for every instance.

        Args:
          embed: `(module, [B, L, ...]) -> [B, L, E]`.
          module: whose parameters `embed` uses.
          inputs_BxNxL: token ids `[B, N, L]`, or features `[B, N, L, F]`.
        """
        of_group = jax.vmap(self.phi, in_axes=(None, 0))

        def add(module: nn.Module, mixed: Array, instance: tuple[Array, Array]) -> tuple[Array, None]:
            parameter, inputs = instance
            return mixed + of_group(parameter, embed(module, inputs)), None

        scan: Any = nn.scan(add, variable_broadcast="params", split_rngs={}, in_axes=((0, 1),))
        batch, _, length = inputs_BxNxL.shape[:3]
        start = jnp.zeros((batch, length, self.spec.width), self.spec.dtype)
        return scan(module, start, (self.parameters(), inputs_BxNxL))[0] * self.scale


class GaussianHadamard(Pointwise):
    """`mean_i(v_i * x_i)` with one Gaussian vector `v_i` an instance (DataMUX, section 3.1, "Hadamard product")."""

    phi = staticmethod(hadamard)

    @nn.compact
    def parameters(self) -> Array:
        return self.gaussians()


class BinaryHadamard(Pointwise):
    """`mean_i(m_i * x_i)`: every instance keeps a chunk of the dimensions (DataMUX, "binary" ablation)."""

    phi = staticmethod(hadamard)

    @nn.compact
    def parameters(self) -> Array:
        return self.instance_embedding(chunk_masks(self.epsilon), self.spec.width)


class RandomOrtho(Pointwise):
    """`sum_i(W_i x_i) / sqrt(N)` with orthogonal matrices `W_i` (DataMUX, section 3.1, "Ortho")."""

    phi = staticmethod(rotate)
    matrices = staticmethod(orthogonal_matrices)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.num_instances)

    @nn.compact
    def parameters(self) -> Array:
        return self.instance_embedding(self.matrices, self.spec.width, self.spec.width)


class RandomOrthoLowRank(RandomOrtho):
    """`sum_i(W_i x_i) / sqrt(N)` with `W_i = U H_i^T` of rank `E // N` (DataMUX, appendix: the theoretical construction)."""

    matrices = staticmethod(low_rank_matrices)


def mixing_block(mux: Multiplexer) -> Block:
    """A Transformer layer of the backbone's own kind, at the width of mixing."""
    # Blocks are mapped over instances or positions, which cuDNN's attention cannot be under a mask.
    spec = dataclasses.replace(mux.spec, hidden_size=mux.spec.width, attention="xla")
    if spec.hidden_size % spec.num_heads:
        raise InputError(
            f"This multiplexer runs attention at the embedding width {spec.hidden_size}, which model.num_heads = {spec.num_heads} does "
            "not divide. Change model.embedding_size or model.num_heads, or use mux.name = 'gaussian_hadamard'."
        )
    return Block(spec)


def over_rows(block: Block, x: Array, mask: Array | None, train: bool) -> Array:
    """`block` on every row `[B, J, E]` of `x` `[B, I, J, E]`, the rows mapped over `I`; mask `[B, I, J]` or None."""
    keys = jax.random.split(block.make_rng("dropout"), x.shape[1]) if train and block.draws else None

    def one(block: Block, x_BxJxE: Array, mask_BxJ: Array | None, key: Array | None) -> Array:
        return block(x_BxJxE, mask_BxJ, key)

    mapped: Any = nn.vmap(
        one,
        variable_axes={"params": None},
        split_rngs={"params": False},
        in_axes=(1, None if mask is None else 1, None if keys is None else 0),
        out_axes=1,
    )
    return mapped(block, x, mask, keys)


class Contextual(Multiplexer):
    """The contextual multiplexer of MUX-PLMs (section 3.1; `gaussian_attention_v2` in published configs).

    `c = T1(x) + x` over the positions of each instance; `g_i = v_i * c_i`; at every position `T2` attends over the `N` instances;
    the result is `mean_i(T2(g)_i + g_i)`.
    """

    def setup(self) -> None:
        self.over_positions = mixing_block(self)
        self.over_instances = mixing_block(self)
        self.vectors = self.gaussians()

    def __call__(self, x_BxNxLxE: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        context = over_rows(self.over_positions, x_BxNxLxE, mask_BxNxL, train) + x_BxNxLxE
        g_BxNxLxE = transform(hadamard, self.vectors, context)
        mask_BxLxN = jnp.swapaxes(mask_BxNxL, 1, 2) if self.mask_instances else None
        mixed_BxLxNxE = over_rows(self.over_instances, jnp.swapaxes(g_BxNxLxE, 1, 2), mask_BxLxN, train)
        return mixed_BxLxNxE.mean(axis=2) + g_BxNxLxE.mean(axis=1)


class GaussianAttention(Multiplexer):
    """The older contextual multiplexer, in MUX-ELECTRA's pre-training code only.

    With `g_i = v_i * x_i`: `mean_i(T(g_i)) + LN(gelu(W mean_i(g_i)))`; `T` attends over the positions of an instance, unmasked.
    """

    def setup(self) -> None:
        self.over_positions = mixing_block(self)
        self.cross = dense(self.spec, self.spec.width, (None, "embed"))
        # Published code leaves torch's default epsilon here, unlike everywhere else.
        self.cross_norm = layer_norm(dataclasses.replace(self.spec, layer_norm_eps=1e-5))
        self.vectors = self.gaussians()

    def __call__(self, x_BxNxLxE: Array, mask_BxNxL: Array | None = None, train: bool = False) -> Array:
        del mask_BxNxL
        g_BxNxLxE = transform(hadamard, self.vectors, x_BxNxLxE)
        cross = self.cross_norm(gelu(self.cross(g_BxNxLxE.mean(axis=1))))
        return over_rows(self.over_positions, g_BxNxLxE, None, train).mean(axis=1) + cross


# `none` is the plain network: one instance, mixed with nothing. `model.py` then leaves mixing and unmixing out altogether.
MUX: dict[str, type[Multiplexer] | None] = {
    "none": None,
    "gaussian_hadamard": GaussianHadamard,
    "binary_hadamard": BinaryHadamard,
    "random_ortho": RandomOrtho,
    "random_ortho_low_rank": RandomOrthoLowRank,
    "contextual": Contextual,
    "gaussian_attention": GaussianAttention,
}
