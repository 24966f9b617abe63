"""Heads: demultiplexed states to logits, always float32."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.families import HeadForm
from datamux_jax.layers import Array, Embeddings, Spec, dense, gelu, kernel_init, layer_norm, parameter
from datamux_jax.sharding import constrain


class ClassificationHead(nn.Module):
    """Classes, tags, or a number for regression: `[..., D] -> [..., C]`.

    Attributes:
      spec: sizes.
      num_classes: `C`; 1 for regression.
      form: which layers; `families.head_form` knows what the published code has.
    """

    spec: Spec
    num_classes: int
    form: HeadForm = HeadForm()

    def setup(self) -> None:
        if self.form.hidden:
            self.hidden = dense(self.spec, self.spec.hidden_size, ("embed", None))
        if self.form.norm:
            self.norm = layer_norm(self.spec)
        self.out = dense(self.spec, self.num_classes, ("embed", None))
        self.dropout = nn.Dropout(self.spec.dropout_rate if self.form.dropout else 0.0)

    def __call__(self, x: Array, train: bool = False) -> Array:
        x = self.dropout(x, deterministic=not train)
        if self.form.hidden:
            x = gelu(self.hidden(x))
            if self.form.norm:
                x = self.norm(x)
            x = self.dropout(x, deterministic=not train)
        return self.out(x).astype("float32")


class ReplacedTokenHead(nn.Module):
    """ELECTRA's discriminator: was this token replaced? One logit a position, `[..., D] -> [...]`."""

    spec: Spec

    def setup(self) -> None:
        self.hidden = dense(self.spec, self.spec.hidden_size, ("embed", None))
        self.out = dense(self.spec, 1, ("embed", None))

    def __call__(self, x: Array) -> Array:
        return self.out(gelu(self.hidden(x)))[..., 0].astype("float32")


class StateHeads(nn.Module):
    """Guesses of another network's hidden states, linear in the states that they are read from.

    Attributes:
      spec: sizes.
      num_instances: `N`.
    """

    spec: Spec
    num_instances: int

    def setup(self) -> None:
        spec, width = self.spec, self.spec.hidden_size
        self.last = dense(spec, width, ("embed", None))
        if inner := spec.num_layers - 1:
            # What no demultiplexer reads: every instance has a matrix of its own on every layer.
            shape, axes = (inner, self.num_instances, width, width), (None, "instances", "embed", None)
            self.inner_kernel = parameter(self, "inner_kernel", kernel_init(spec, batch_axis=(0, 1)), axes, shape)
            self.inner_bias = parameter(self, "inner_bias", nn.initializers.zeros, (None, None), (inner, width))

    def __call__(self, states: Array) -> Array:
        """From demultiplexed states of the last layer, `[..., D]` both; float32."""
        return self.last(states).astype("float32")

    def inner(self, h_KxBxPxD: Array) -> Array:
        """From mixed states of the `K` layers below the last one, those of all instances: `[K, B, N, P, D]`, float32."""
        kernel, bias = (x.astype(h_KxBxPxD.dtype) for x in (self.inner_kernel, self.inner_bias))
        read = jnp.einsum("kbpd,knde->kbnpe", h_KxBxPxD, kernel)
        return (read + bias[:, None, None, None]).astype("float32")


LANES = 128  # Columns that a TPU's matrix unit takes at a time.


@jax.custom_vjp
def scores(x: Array, table_VxD: Array, bias_V: Array) -> Array:
    """`x @ table.T + bias`, float32 `[..., V]`, whose gradient has no sum over the rows of so wide an array.

    XLA takes long for that sum, which is the bias' gradient, see `own_product` and `one_product`.
    """
    return (x @ table_VxD.T).astype(jnp.float32) + bias_V


def _scores_forward(x: Array, table_VxD: Array, bias_V: Array) -> tuple[Array, tuple[Array, Array]]:
    return scores(x, table_VxD, bias_V), (x, table_VxD)


def _scores_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    x, table_VxD = saved
    table, bias = jax.lax.platform_dependent(x, gradient, cpu=own_product, default=one_product)
    return gradient.astype(x.dtype) @ table_VxD, table, bias


scores.defvjp(_scores_forward, _scores_backward)


def _over_rows(left: Array, right: Array, **options: Any) -> Array:
    rows = tuple(range(right.ndim - 1))
    return jax.lax.dot_general(left, right, ((rows, rows), ((), ())), **options)


def own_product(x: Array, gradient: Array) -> tuple[Array, Array]:
    """Gradients of the table `[V, D]` and the bias `[V]` of `scores`, the latter a product with ones.

    On a CPU that takes a third of the time of the sum (1,024 x 30,522: 39 and 110 ms on 2 cores).

    Args:
      x: states, `[..., D]`.
      gradient: of the scores, float32 `[..., V]`.
    """
    ones = jnp.ones(gradient.shape[:-1], gradient.dtype)
    return _over_rows(gradient.astype(x.dtype), x), _over_rows(ones, gradient, precision=jax.lax.Precision.HIGHEST)


def one_product(x: Array, gradient: Array) -> tuple[Array, Array]:
    """As `own_product`, the bias as one more column of the table, for which all states have a one.

    For 7,000 rows of BERT's vocabulary on a v5e the compiler reckons 9.4 ms forwards and backwards, with a loss of one pass
    (`vocabulary.scored_at_once`), and 13.9 with products of their own and two passes.
    """
    width = x.shape[-1]
    ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
    # To whole lanes, or the compiler turns the table over, and back.
    longer = jnp.concatenate([x, ones, jnp.zeros((*x.shape[:-1], LANES - 1), x.dtype)], axis=-1)
    both = _over_rows(gradient.astype(x.dtype), longer)  # Devices sum it in this dtype, as the gradients of all other layers.
    return both[:, :width], both[:, width].astype(gradient.dtype)


class VocabularyHead(nn.Module):
    """Logits over the vocabulary, for retrieval and MLM: `[..., D] -> [..., V]`.

    Call it with the states of positions that carry a loss, never with all `N` planes: `V` is the largest axis there is.

    Attributes:
      spec: sizes.
      vocab_size: `V`.
      tied: the decoder's matrix is the word embedding table (BERT); otherwise it has its own (RoBERTa and ELECTRA multiplexed).
      transform: dense `D -> E`, gelu and LayerNorm before the decoder. The plain network needs it; a demultiplexer's stack ends with
        such a layer of its own.
    """

    spec: Spec
    vocab_size: int
    tied: bool = True
    transform: bool = False

    def setup(self) -> None:
        if self.transform:
            self.hidden = dense(self.spec, self.spec.width, ("embed", None))
            self.norm = layer_norm(self.spec)
        if not self.tied:
            width = self.spec.width if self.transform else self.spec.hidden_size
            self.kernel = parameter(self, "kernel", kernel_init(self.spec), ("embed", "vocab"), (width, self.vocab_size))
        self.bias = parameter(self, "bias", nn.initializers.zeros, ("vocab",), (self.vocab_size,))

    def __call__(self, x: Array, embeddings: Embeddings) -> Array:
        if self.transform:
            x = self.norm(gelu(self.hidden(x)))
        table = embeddings.table if self.tied else self.kernel.T
        return constrain(scores(x, table.astype(x.dtype), self.bias), "tensor")
