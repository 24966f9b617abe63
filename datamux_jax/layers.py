"""Building blocks of the encoders: embeddings, attention, MLP and the post-LN block.

Every parameter carries logical axis names (`embed`, `mlp`, `heads`, `head_dim`, `vocab`, ...); `sharding.py` maps them to a mesh.
Shapes in names: `B` groups, `N` instances, `L` positions, `E` embedding width, `D` hidden width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from datamux_jax.errors import InputError
from datamux_jax.sharding import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and constants that all layers of one network share.

    Attributes:
      hidden_size: `D`, width of the encoder.
      num_layers: number of post-LN blocks.
      num_heads: attention heads; divides `hidden_size`.
      mlp_dim: width inside a block's MLP.
      embedding_size: `E`, width of embeddings and of mixing; 0 means `hidden_size`.
      dropout_rate: after embeddings, attention and MLP.
      attention_dropout_rate: on attention weights.
      layer_norm_eps: of every LayerNorm of the model.
      init_stddev: of dense kernels and embedding tables; 0 means Glorot-normal kernels and 0.02 for tables.
      dtype: of the computation; parameters are always float32.
      remat: what a block keeps for the backward pass, a key of `backbones.encoder.REMAT`.
      scan: compile one block and run it `num_layers` times; the parameters are the same.
      attention: an entry of `ATTENTION`; with dropout on attention weights it is XLA's.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    embedding_size: int = 0
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    layer_norm_eps: float = 1e-12
    init_stddev: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = False
    attention: str = "xla"

    @property
    def width(self) -> int:
        """`E`, the width at which instances are mixed."""
        return self.embedding_size or self.hidden_size


def kernel_init(spec: Spec, batch_axis: Sequence[int] = ()) -> nn.initializers.Initializer:
    """Of kernels `[in, out]`, stacked along the axes `batch_axis`."""
    return (
        nn.initializers.normal(spec.init_stddev) if spec.init_stddev else nn.initializers.glorot_normal(batch_axis=batch_axis)
    )


def table_init(spec: Spec) -> nn.initializers.Initializer:
    return nn.initializers.normal(spec.init_stddev or 0.02)


def dense(spec: Spec, features: int, axes: Sequence[str | None], *, use_bias: bool = True) -> nn.Dense:
    """A dense layer whose kernel `[in, features]` has the logical axes `axes`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=spec.dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init(spec), tuple(axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes[-1],)),
    )


def layer_norm(spec: Spec) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=spec.layer_norm_eps,
        dtype=spec.dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    )


def gelu(x: Array) -> Array:
    """The exact GELU, `x (1 + erf(x / sqrt 2)) / 2`, as BERT, RoBERTa and ELECTRA use it.

    That of `jax.nn` has `erfc` in its place. XLA makes several polynomials with exponentials of that, which take three times as long on
    a CPU (1,024 x 3,072: 6.4 and 1.9 ms on 2 cores) and half a minute longer to compile for a TPU. `erf` loses digits beside -1 in the
    left tail, 7e-7 at most, as in PyTorch; in bfloat16 they would be seen, so it is always at least float32.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, axes: Sequence[str | None], shape: tuple[int, ...]
) -> Array:
    """A parameter of `module` with logical axes."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(init, tuple(axes)), shape))


class Embeddings(nn.Module):
    """Token (or feature) + position + type embeddings, LayerNorm, dropout.

    With `vocab_size` the inputs are token ids `[..., L]`; without, they are feature vectors `[..., L, F]`, embedded linearly.

    A multiplexed network applies this block twice, as the published code does: once to every instance, and once, through
    `refine`, to the mixed embeddings (MUX-PLMs enter the backbone through `inputs_embeds`, which adds positions and types again).

    Attributes:
      spec: sizes.
      num_positions: rows of the position table.
      vocab_size: `V`; 0 for feature inputs.
      type_vocab_size: token types, of which type 0 is used; 0: none.
      pad_position: RoBERTa's rule, with the pad id as its value: real tokens are counted from `pad + 1`, a pad stands at position
        `pad`. None: position `j` is `j`.
    """

    spec: Spec
    num_positions: int
    vocab_size: int = 0
    type_vocab_size: int = 0
    pad_position: int | None = None

    def setup(self) -> None:
        spec, width = self.spec, self.spec.width
        init = table_init(spec)
        if self.vocab_size:
            self.word = nn.Embed(
                self.vocab_size,
                width,
                dtype=spec.dtype,
                embedding_init=nn.with_logical_partitioning(init, ("vocab", "embed")),
            )
        else:
            self.feature = dense(spec, width, (None, "embed"))
        self.position = parameter(self, "position", init, (None, "embed"), (self.num_positions, width))
        if self.type_vocab_size:
            self.type = parameter(self, "type", init, (None, "embed"), (self.type_vocab_size, width))
        self.norm = layer_norm(spec)
        self.dropout = nn.Dropout(spec.dropout_rate)

    def __call__(self, inputs: Array, train: bool = False, start: int = 0) -> Array:
        """Embeds every instance: `[..., L]` ids or `[..., L, F]` features -> `[..., L, E]`.

        Args:
          inputs: token ids or features.
          train: draw dropout.
          start: real tokens that stand before the inputs, in the same row.
        """
        if not self.vocab_size:
            return self.refine(self.feature(inputs), train, start)
        if self.pad_position is None:
            return self.refine(self.word(inputs), train, start)
        real = inputs != self.pad_position
        positions = jnp.where(real, jnp.cumsum(real, axis=-1) + start, 0) + self.pad_position
        return self._finish(self.word(inputs), jnp.asarray(self.position)[positions], train)

    def refine(self, x: Array, train: bool = False, start: int = 0) -> Array:
        """Adds positions and types to `[..., L, E]`, then LayerNorm and dropout: `[..., L, E]`; the first position is `start`."""
        start += 0 if self.pad_position is None else self.pad_position + 1
        return self._finish(x, self.position[start : start + x.shape[-2]], train)

    def _finish(self, x: Array, positions: Array, train: bool) -> Array:
        added = positions + self.type[0] if self.type_vocab_size else positions
        return constrain(self.dropout(self.norm(x + added.astype(x.dtype)), deterministic=not train))

    @property
    def table(self) -> Array:
        """The word embedding table, `[V, E]`; a tied decoder's matrix."""
        return cast(Array, self.word.embedding)


def by_heads(x: Array) -> Array:
    """Keeps `[B, L, heads, head_dim]` split by groups, and heads over `tensor`."""
    return jnp.swapaxes(constrain(jnp.swapaxes(x, -2, -1), "tensor"), -2, -1)


# `cudnn` is cuDNN's fused attention on NVIDIA GPUs, which never writes the scores; elsewhere it is as `xla`.
ATTENTION = ("xla", "cudnn")


def on_cuda() -> bool:
    """Whether JAX runs on NVIDIA GPUs here."""
    return "cuda" in get_backend().platform_version


def attend(q: Array, k: Array, v: Array, allowed: Array | None, attention: str = "xla") -> Array:
    """Softmax attention, `[B, L, heads, head_dim]`.

    That of `jax.nn`, but on CPUs, see `heads_first`. For a v5e the compiler reckons 6% more for a training step with that order of
    axes.

    Args:
      q: queries, `[B, L, heads, head_dim]`.
      k: keys, likewise.
      v: values, likewise.
      allowed: true where a key may be attended to, broadcast against `[B, heads, L, L]` (query, key); None: everywhere. Where nothing
        may, all weights are equal.
      attention: an entry of `ATTENTION`. `cudnn` takes float16 and bfloat16 alone, and heads of a multiple of 8 dimensions, 128 at
        most.

    Raises:
      InputError: `cudnn`, and rows of an odd number of positions under a mask.
    """

    def of_jax(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=allowed)

    kernels: dict[str, Callable[..., Array]] = {"cpu": heads_first}
    if attention == "cudnn" and on_cuda():  # JAX looks for cuDNN when it traces this, whatever it is compiled for.
        kernels["cuda"] = of_cudnn
    return cast(Array, jax.lax.platform_dependent(q, k, v, allowed, default=of_jax, **kernels))


def of_cudnn(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """Attention by cuDNN's fused kernel."""
    length = q.shape[1]
    if allowed is not None:
        if length % 2:
            raise InputError(
                f"attention = 'cudnn' takes rows of an even number of positions, but these have {length} (prefix included). Make "
                "data.length one longer or shorter, or use attention = 'xla'."
            )
        # It broadcasts over groups and heads alone.
        allowed = constrain(jnp.broadcast_to(allowed, (len(q), *allowed.shape[1:2], length, length)))
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation="cudnn")


def heads_first(q: Array, k: Array, v: Array, allowed: Array | None) -> Array:
    """The function of `jax.nn.dot_product_attention`, with heads before positions; scores and weights are float32 or wider.

    Weights are divided by their sums after the product with the values, whose rows are shorter.
    """
    q, k, v = (jnp.swapaxes(x, -3, -2) for x in (q * q.shape[-1] ** -0.5, k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=wide)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(wide).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    context = jnp.einsum("...ts,...sd->...td", weights.astype(v.dtype), v, preferred_element_type=wide)
    return jnp.swapaxes((context / weights.sum(-1, keepdims=True)).astype(v.dtype), -3, -2)


def attention_weights(q: Array, k: Array, allowed: Array | None) -> Array:
    """The weights `[B, heads, L, L]` (query, key) of `attend`, which returns none: its results for one-hot values.

    Values are as wide as a head, so the keys come in pieces.

    Args:
      q: queries, `[B, L, heads, head_dim]`.
      k: keys, likewise.
      allowed: mask as the attention has it.
    """
    length, heads, width = q.shape[-3:]
    pieces = -(-length // width)
    onehot = jnp.eye(length, pieces * width, dtype=q.dtype).reshape(length, pieces, 1, width)
    values = jnp.broadcast_to(jnp.moveaxis(onehot, 1, 0)[:, None], (pieces, len(q), length, heads, width))
    parts = jax.vmap(lambda v: attend(q, k, v, allowed))(values)
    return jnp.einsum("pblhw->bhlpw", parts).reshape(len(q), heads, length, pieces * width)[..., :length]


class Attention(nn.Module):
    """Multi-head self-attention with biases: `[..., L, D] -> [..., L, D]`."""

    spec: Spec

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, key: Array | None = None) -> Array:
        """
        Args:
          x: `[..., L, D]`.
          mask: `[..., L]`, true where a position may be attended to; None: everywhere. Where nothing may be attended
            to, attention is uniform, as in the published code (masks add the smallest finite float, not minus infinity).
          key: of the dropout; None: no dropout.
        """
        spec = self.spec
        heads = spec.num_heads
        head_dim = spec.hidden_size // heads

        def project(name: str) -> Array:
            return nn.DenseGeneral(
                (heads, head_dim),
                dtype=spec.dtype,
                kernel_init=nn.with_logical_partitioning(kernel_init(spec), ("embed", "heads", "head_dim")),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("heads", "head_dim")),
                name=name,
            )(x)

        q, k, v = (by_heads(project(name)) for name in ("query", "key", "value"))
        allowed = None if mask is None else mask[..., None, None, :].astype(bool)
        if key is not None and spec.attention_dropout_rate > 0:
            # `jax.nn.dot_product_attention` has no dropout; the published recipes train with it.
            y = nn.dot_product_attention(
                q,
                k,
                v,
                mask=allowed,
                dropout_rng=key,
                dropout_rate=spec.attention_dropout_rate,
                broadcast_dropout=False,
                dtype=q.dtype,
            )
        else:
            y = attend(q, k, v, allowed, spec.attention)
            if self.is_mutable_collection("intermediates"):  # Somebody looks inside; `attend` returns no weights.
                self.sow("intermediates", "weights", attention_weights(q, k, allowed))
        y = by_heads(y)
        return nn.DenseGeneral(
            spec.hidden_size,
            axis=(-2, -1),
            dtype=spec.dtype,
            kernel_init=nn.with_logical_partitioning(kernel_init(spec), ("heads", "head_dim", "embed")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            name="out",
        )(y)


class Block(nn.Module):
    """Post-LN Transformer block: attention, residual, LayerNorm; GELU MLP, residual, LayerNorm."""

    spec: Spec

    def setup(self) -> None:
        spec = self.spec
        self.attention = Attention(spec)
        self.attention_norm = self.norm()
        self.mlp_in = dense(spec, spec.mlp_dim, ("embed", "mlp"))
        self.mlp_out = dense(spec, spec.hidden_size, ("mlp", "embed"))
        self.mlp_norm = self.norm()
        self.dropout = nn.Dropout(spec.dropout_rate)

    def norm(self) -> Callable[[Array], Array]:
        """What follows each residual; `theory.py` has blocks with another one."""
        return layer_norm(self.spec)

    @property
    def draws(self) -> bool:
        """Whether training needs a key."""
        return max(self.spec.dropout_rate, self.spec.attention_dropout_rate) > 0

    def __call__(self, x: Array, mask: Array | None = None, key: Array | None = None) -> Array:
        """`[..., L, D] -> [..., L, D]`; `mask` and `key` as in `Attention`.

        Keys are given, not drawn from a stream, so that a block drops the same numbers whether it is called, scanned or
        rematerialised.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def drop(y: Array, key: Array | None) -> Array:
            return self.dropout(y, deterministic=key is None, rng=key)

        x = self.attention_norm(x + drop(constrain(self.attention(x, mask, keys[0])), keys[1]))
        wide = constrain(gelu(self.mlp_in(constrain(x))), "tensor")
        return constrain(self.mlp_norm(x + drop(constrain(self.mlp_out(wide)), keys[2])))


def masked_mean(x_BxLxD: Array, mask_BxNxL: Array) -> Array:
    """Means of `x` over the positions where each of `N` masks is 1: `[B, N, D]`; zero where a mask is 0 everywhere."""
    weight = mask_BxNxL.astype(x_BxLxD.dtype)
    return jnp.einsum("bld,bnl->bnd", x_BxLxD, weight) / jnp.maximum(weight.sum(-1, keepdims=True), 1)
