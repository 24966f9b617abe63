"""Composition: embed every instance, mix, run the backbone once, unmix, read out.

    inputs [B,N,L] -> embed [B,N,L,E] -> mux [B,L,E] -> backbone [B,L,D] -> demux [B,N,L,D] -> head

With the multiplexer `none` (one instance) the same module is the plain Transformer: one embedding pass, padding masked in
attention, nothing mixed and nothing unmixed. That is the baseline every report compares with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.backbones import BACKBONES
from datamux_jax.demux import DEMUX
from datamux_jax.errors import InputError, choose
from datamux_jax.heads import SequenceHead, VocabularyHead
from datamux_jax.layers import Array, Embeddings, Spec, masked_mean
from datamux_jax.mux import MUX

POOLS = {
    "first": "the state at position 0, demultiplexed",
    "mean": "the mean of the mixed state over an instance's own positions, demultiplexed",
    "demuxed_mean": "every position demultiplexed, then the mean over an instance's own positions",
}


class MultiplexedTransformer(nn.Module):
    """A Transformer over `N` mixed token (or feature) sequences, with classification and retrieval heads.

    Attributes:
      spec: sizes of embeddings, encoder and heads.
      num_instances: `N`.
      mux: a multiplexer of width `spec.width`, or None for the plain network (`N` = 1).
      demux: a demultiplexer, or None for the plain network.
      backbone: module on one mixed row, `(x_BxLxE, mask, train) -> h_BxLxD`.
      max_length: longest input `L`.
      num_classes: `C`; 0: no classification head.
      vocab_size: `V`; 0: inputs are feature vectors and there is no retrieval head.
      type_vocab_size: token types (BERT: 2, of which only type 0 is used); 0: none.
      pool: what classification reads, a key of `POOLS`.
    """

    spec: Spec
    num_instances: int
    mux: nn.Module | None
    demux: nn.Module | None
    backbone: nn.Module
    max_length: int
    num_classes: int = 0
    vocab_size: int = 0
    type_vocab_size: int = 0
    pool: str = "first"

    def setup(self) -> None:
        self.embeddings = Embeddings(self.spec, self.max_length, self.vocab_size, self.type_vocab_size)
        if self.num_classes:
            self.classifier = SequenceHead(self.spec, self.num_classes)
        if self.vocab_size:
            self.decoder = VocabularyHead(self.spec, self.vocab_size)

    def __call__(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> dict[str, Array]:
        """Touches every parameter: `init` uses it. Returns the outputs of all heads the network has."""
        h = self.encode(inputs, mask_BxNxL, train)
        out = {}
        if self.num_classes:
            out["logits"] = self.classify(h, mask_BxNxL, train)
        if self.vocab_size:
            out["retrieved"] = self.retrieve(h, jnp.zeros(h.shape[:2], jnp.int32), train)
        return out

    def encode(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Embeds, mixes and runs the backbone.

        Args:
          inputs: token ids `[B, N, L]` or features `[B, N, L, F]`.
          mask_BxNxL: 1 at real positions, 0 at padding.
          train: draw dropout from the stream `dropout`.

        Returns:
          Hidden states of the mixed rows, `[B, L, D]`.

        Raises:
          InputError: `inputs` holds another number of instances than the network mixes.
        """
        if inputs.shape[1] != self.num_instances:
            raise InputError(
                f"The inputs have shape {inputs.shape}, so {inputs.shape[1]} instances a group, but this network mixes "
                f"{self.num_instances}. Group the inputs as [groups, {self.num_instances}, ...]."
            )
        x = self.embeddings(inputs, train)
        if self.mux is None:
            return self.backbone(x[:, 0], mask_BxNxL[:, 0], train)
        mixed = self.embeddings.refine(self.mux(x, mask_BxNxL, train), train)
        return self.backbone(mixed, None, train)

    def classify(self, h_BxLxD: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Class logits of every instance: `[B, N, C]`, float32."""
        return self.classifier(self.features(h_BxLxD, mask_BxNxL, train), train)

    def features(self, h_BxLxD: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """One demultiplexed vector an instance, read as `pool` says: `[B, N, D]`."""
        if self.pool == "demuxed_mean":
            states = h_BxLxD[:, None] if self.demux is None else self.demux(h_BxLxD, train=train)
            return masked_mean(states, mask_BxNxL)
        if self.pool == "first":
            pooled = h_BxLxD[:, :1]
            return pooled if self.demux is None else self.demux(pooled, train=train)[:, :, 0]
        pooled = masked_mean(h_BxLxD[:, None], mask_BxNxL)
        if self.demux is None:
            return pooled
        # The pooled states of a group stand in one row, and instance i reads position i.
        own = jnp.broadcast_to(jnp.arange(self.num_instances), pooled.shape[:2])
        return self.demux(pooled, (own, own), train=train)

    def retrieve(self, h_BxLxD: Array, instance_BxL: Array, train: bool = False) -> Array:
        """Vocabulary logits of the chosen instance at every position: `[B, L, V]`, float32.

        Args:
          h_BxLxD: hidden states of the mixed rows.
          instance_BxL: which instance to read at each position.
          train: draw dropout from the stream `dropout`.
        """
        if self.demux is None:
            return self.decoder(h_BxLxD, self.embeddings)
        position = jnp.broadcast_to(jnp.arange(h_BxLxD.shape[1]), h_BxLxD.shape[:2])
        states = self.demux(h_BxLxD, (instance_BxL, position), stack="retrieval", train=train)
        return self.decoder(states, self.embeddings)


def build(config: Any, *, num_classes: int, vocab_size: int, max_length: int) -> MultiplexedTransformer:
    """Builds the network that `config` describes for a data set of the given sizes.

    Args:
      config: a complete config (`configs/common.py`).
      num_classes: of the label set.
      vocab_size: of the tokenizer; 0 for feature inputs.
      max_length: `L`.

    Raises:
      InputError: an unknown name, or sizes that do not fit together.
    """
    m, n = config.model, config.num_instances
    spec = Spec(
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        mlp_dim=m.mlp_dim,
        embedding_size=m.embedding_size,
        dropout_rate=m.dropout_rate,
        attention_dropout_rate=m.attention_dropout_rate,
        layer_norm_eps=m.layer_norm_eps,
        init_stddev=m.init_stddev,
        dtype=config.dtype,
    )
    mux_class = MUX[choose(MUX, config.mux.name, "The multiplexer mux.name =")]
    demux_class = DEMUX[choose(DEMUX, config.demux.name, "The demultiplexer demux.name =")]
    mux = demux = None
    if mux_class:
        mux = mux_class(
            num_instances=n, features=spec.width, norm=config.mux.norm, learned=config.mux.learned, dtype=config.dtype
        )
    if demux_class:
        demux = demux_class(spec=spec, num_instances=n, num_layers=config.demux.num_layers, form=config.demux.form)
    return MultiplexedTransformer(
        spec=spec,
        num_instances=n,
        mux=mux,
        demux=demux,
        backbone=BACKBONES[choose(BACKBONES, m.backbone, "The backbone model.backbone =")](spec),
        max_length=max_length,
        num_classes=num_classes,
        vocab_size=vocab_size,
        type_vocab_size=m.type_vocab_size,
        pool=choose(POOLS, m.pool, "The pooling model.pool ="),
    )


def init_params(model: MultiplexedTransformer, key: Array, inputs_shape: tuple[int, ...], inputs_dtype: Any) -> Any:
    """Fresh parameters, boxed with their logical axis names.

    Args:
      model: the network.
      key: random key.
      inputs_shape: `[B, N, L]` or `[B, N, L, F]`; `B` may be 1.
      inputs_dtype: of the inputs.
    """
    inputs = jnp.zeros(inputs_shape, inputs_dtype)
    mask = jnp.ones(inputs_shape[:3], jnp.int32)
    return model.init({"params": key}, inputs, mask)["params"]


def call(model: nn.Module, params: Any, method: str, *args: Any, rngs: Mapping[str, Array] | None = None) -> Array:
    """One method of the network, applied: `call(model, params, "encode", inputs, mask)`."""
    return cast(Array, model.apply({"params": params}, *args, method=method, rngs=dict(rngs or {})))


def count_params(params: Any) -> int:
    """Number of scalars in a parameter tree."""
    return sum(int(x.size) for x in jax.tree.leaves(params))
