"""Heads: demultiplexed states to logits."""

from __future__ import annotations

import flax.linen as nn

from datamux_jax.layers import Array, Embeddings, Spec, dense, parameter


class SequenceHead(nn.Module):
    """Dropout and one dense layer (BERT): `[..., D] -> [..., C]`, float32."""

    spec: Spec
    num_classes: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dropout(self.spec.dropout_rate)(x, deterministic=not train)
        return dense(self.spec, self.num_classes, ("embed", None))(x).astype("float32")


class VocabularyHead(nn.Module):
    """Logits over the vocabulary, tied to the word embeddings plus a bias: `[..., D] -> [..., V]`, float32.

    Call it with the states of positions that carry a loss, never with all `N` planes: `V` is the largest axis there is.
    """

    spec: Spec
    vocab_size: int

    @nn.compact
    def __call__(self, x: Array, embeddings: Embeddings) -> Array:
        bias = parameter(self, "bias", nn.initializers.zeros, ("vocab",), (self.vocab_size,))
        return embeddings.attend(x).astype("float32") + bias
