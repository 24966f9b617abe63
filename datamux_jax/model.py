"""Composition: embed every instance, mix, run the backbone once, unmix, read out.

    inputs [B,N,L] -> embed [B,N,L,E] -> mux [B,L,E] -> backbone [B,L,D] -> demux [B,N,L,D] -> head

With the multiplexer `none` (one instance) the same module is the plain Transformer: one embedding pass, padding masked in
attention, nothing mixed and nothing unmixed. That is the baseline every report compares with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp

from datamux_jax.demux import Demultiplexer
from datamux_jax.errors import InputError
from datamux_jax.families import HeadForm, SpecialTokens
from datamux_jax.heads import ClassificationHead, ReplacedTokenHead, StateHeads, VocabularyHead
from datamux_jax.layers import Array, Embeddings, Spec, masked_mean
from datamux_jax.mux import Pointwise

POOLS = {
    "first": "the state at position 0 (with an index prefix: at the CLS-like token), demultiplexed",
    "mean": "the mean of the mixed state over an instance's own positions, demultiplexed",
    "demuxed_mean": "every position demultiplexed, then the mean over an instance's own positions",
}


class Network(nn.Module):
    """What training, evaluation, prediction and benchmarks ask of a network, whatever it computes."""

    @property
    def cut(self) -> int:
        """Positions that an index prefix takes from the end of every row."""
        return 0

    def encode(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """States of the mixed inputs `[B, N, L]` or `[B, N, L, F]`; the first axis is that of the groups."""
        raise NotImplementedError

    def features(self, h: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """The state of every instance from which it is classified: `[B, N, D]`."""
        raise NotImplementedError

    def classify(self, h: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Class logits of every instance: `[B, N, C]`, float32."""
        raise NotImplementedError


class MultiplexedTransformer(Network):
    """A Transformer over `N` mixed token (or feature) sequences, with the heads that an objective needs.

    `L` is the length of the inputs, `L'` that of the rows that the network is fed: an index prefix makes them longer.

    Attributes:
      spec: sizes of embeddings, encoder and heads.
      num_instances: `N`.
      mux: a multiplexer of width `spec.width`, or None for the plain network (`N` = 1).
      demux: a demultiplexer, or None for the plain network.
      backbone: module on one mixed row, `(x_BxLxE, mask, train) -> h_BxLxD`.
      num_positions: rows of the position table.
      num_classes: `C`; 0: no classification head.
      vocab_size: `V`; 0: inputs are feature vectors.
      type_vocab_size: token types (BERT: 2, of which only type 0 is used); 0: none.
      tokens: ids of the special tokens; None for feature inputs.
      pad_position: see `Embeddings`.
      vocabulary_head: whether there is one; retrieval and MLM need it.
      tied_decoder: see `VocabularyHead`.
      head: `sequence`, `token`, `replaced`, `states`, or none: a value of `build.HEADS`.
      classifier_form: layers of the classification head.
      pool: what sequence classification reads, a key of `POOLS`.
      retrieval_start: first position of the fed row that carries the retrieval loss.
      logits_mib: MiB of vocabulary logits and their gradient that a device holds at a time; scoring, without a gradient, holds half.
      attend_padding: attention in mixed rows also sees positions where all instances are padding (published code). If it does not,
        rows may be cut to their longest instance without changing a number, unless the multiplexer itself attends to padding.
    """

    spec: Spec
    num_instances: int
    mux: nn.Module | None
    demux: Demultiplexer | None
    backbone: nn.Module
    num_positions: int
    num_classes: int = 0
    vocab_size: int = 0
    type_vocab_size: int = 0
    tokens: SpecialTokens | None = None
    pad_position: int | None = None
    vocabulary_head: bool = False
    tied_decoder: bool = True
    head: str = "sequence"
    classifier_form: HeadForm = HeadForm()
    pool: str = "first"
    retrieval_start: int = 0
    logits_mib: float = 2048
    attend_padding: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.spec, self.num_positions, self.vocab_size, self.type_vocab_size, self.pad_position)
        if self.head in ("sequence", "token"):
            self.classifier = ClassificationHead(self.spec, self.num_classes, self.classifier_form)
        if self.head == "replaced":
            self.replaced_head = ReplacedTokenHead(self.spec)
        if self.head == "states":
            self.state_heads = StateHeads(self.spec, self.num_instances)
        if self.vocabulary_head:
            self.decoder = VocabularyHead(self.spec, self.vocab_size, self.tied_decoder, transform=self.demux is None)

    def __call__(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> dict[str, Array]:
        """Touches every parameter: `init` uses it. Returns the outputs of all heads that the network has."""
        h = self.encode(inputs, mask_BxNxL, train)
        out = {}
        if self.head == "sequence":
            out["logits"] = self.classify(h, mask_BxNxL, train)
        elif self.head == "token":
            out["logits"] = self.tag(h, train)
        elif self.head == "replaced":
            out["logits"] = self.replaced(h, train)
        elif self.head == "states":
            out["states"] = self.states(h, train)
            if self.spec.num_layers > 1:
                self.layer_states(jnp.stack([h] * (self.spec.num_layers - 1)))
        else:
            self.features(h, mask_BxNxL, train)
        if self.vocabulary_head:
            out["retrieved"] = self.retrieve(h, jnp.zeros(h.shape[:2], jnp.int32), train)
        return out

    @property
    def cut(self) -> int:
        return self.demux.offset if self.demux is not None and self.demux.cut else 0

    @property
    def offset(self) -> int:
        """Token `j` of an instance stands at position `offset + j` of the fed row."""
        return self.demux.offset if self.demux is not None else 0

    def feed(self, inputs: Array) -> Array:
        """What the network is fed: token ids with the demultiplexer's prefix, `[B, N, L']`. Features pass unchanged."""
        return self.demux.prefix(inputs) if self.demux is not None and self.vocab_size else inputs

    def fed_mask(self, mask_BxNxL: Array) -> Array:
        """The mask of what the network is fed, `[B, N, L']`."""
        return mask_BxNxL if self.demux is None else self.demux.prefix_mask(mask_BxNxL)

    def encode(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Embeds, mixes and runs the backbone.

        Args:
          inputs: token ids `[B, N, L]` or features `[B, N, L, F]`.
          mask_BxNxL: 1 at real positions, 0 at padding.
          train: draw dropout from the stream `dropout`.

        Returns:
          Hidden states of the mixed rows, `[B, L', D]`.

        Raises:
          InputError: as `enter`.
        """
        return self.process(self.enter(inputs, mask_BxNxL, train), mask_BxNxL, train)

    def enter(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """What the backbone reads, the embedded and mixed rows `[B, L', E]`; arguments as of `encode`.

        Raises:
          InputError: `inputs` holds another number of instances than the network mixes, or more positions than it knows.
        """
        if inputs.shape[1] != self.num_instances:
            raise InputError(
                f"The inputs have shape {inputs.shape}, so {inputs.shape[1]} instances a group, but this network mixes "
                f"{self.num_instances}. Group the inputs as [groups, {self.num_instances}, ...]."
            )
        fed = self.feed(inputs)
        start = 0 if self.pad_position is None else self.pad_position + 1
        if fed.shape[2] + start > self.num_positions:
            raise InputError(
                f"Rows of {fed.shape[2]} positions (prefix included) are fed, but the position table has {self.num_positions} rows, "
                f"of which {self.num_positions - start} are for tokens. Shorten data.length, or raise model.max_positions."
            )
        if self.mux is None:
            return self.embeddings(fed[:, 0], train)
        return self.embeddings.refine(self.mix(fed, self.fed_mask(mask_BxNxL), train), train)

    def encode_layers(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """As `encode`, but the hidden states of all layers: `[layers, B, L', D]`."""
        x_BxLxE = self.enter(inputs, mask_BxNxL, train)
        return cast(Array, self.backbone.every_layer(x_BxLxE, self.attended(mask_BxNxL), train))

    def process(self, x_BxLxE: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """The backbone on what `enter` gives: `[B, L', D]`."""
        return self.backbone(x_BxLxE, self.attended(mask_BxNxL), train)

    def attended(self, mask_BxNxL: Array) -> Array | None:
        """Positions of the fed rows that attention sees, `[B, L']`; None: all."""
        # Padding of one instance is content of another; without tokens there is none.
        everywhere = self.mux is not None and (self.attend_padding or not self.vocab_size)
        return None if everywhere else self.fed_mask(mask_BxNxL).max(axis=1)

    def mix(self, fed: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Embeds every instance and mixes: `[B, L', E]`. At inference in one pass over the instances, where the multiplexer allows."""
        mux = self.mux
        assert mux is not None, "the plain network mixes nothing"
        if train or self.is_initializing() or not isinstance(mux, Pointwise):
            return cast(Array, mux(self.embeddings(fed, train), mask_BxNxL, train))

        def embed(model: MultiplexedTransformer, inputs: Array, start: int) -> Array:
            return model.embeddings(inputs, start=start)

        # An index prefix is the same in all groups: it is mixed once.
        head, body = fed[:1, :, : self.offset], fed[:, :, self.offset :]
        mixed = mux.mix(functools.partial(embed, start=self.offset), self, body)
        if not self.offset:
            return mixed
        head = mux.mix(functools.partial(embed, start=0), self, head)
        return jnp.concatenate([jnp.broadcast_to(head, (len(mixed), *head.shape[1:])), mixed], axis=1)

    def classify(self, h_BxLxD: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """Class logits of every instance: `[B, N, C]`, float32."""
        return self.classifier(self.features(h_BxLxD, mask_BxNxL, train), train)

    def features(self, h_BxLxD: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """One demultiplexed vector an instance, read as `pool` says: `[B, N, D]`."""
        if self.demux is None:
            return h_BxLxD[:, :1] if self.pool == "first" else masked_mean(h_BxLxD, mask_BxNxL)
        if self.pool == "first":
            at = self.demux.read_position
            return self.demux(h_BxLxD[:, at : at + 1], row=h_BxLxD, train=train)[:, :, 0]
        body = h_BxLxD[:, self.offset :]
        mask = mask_BxNxL[..., : body.shape[1]]
        if self.pool == "demuxed_mean":
            states = self.demux(body, row=h_BxLxD, train=train)
            weight = mask.astype(states.dtype)
            return jnp.einsum("bnld,bnl->bnd", states, weight) / jnp.maximum(weight.sum(-1, keepdims=True), 1)
        # The pooled states of a group stand in one row, and instance i reads position i.
        pooled = masked_mean(body, mask)
        own = jnp.broadcast_to(jnp.arange(self.num_instances), pooled.shape[:2])
        return self.demux(pooled, (own, own), row=h_BxLxD, train=train)

    def token_states(self, h_BxLxD: Array, train: bool = False, stack: str = "task") -> Array:
        """The demultiplexed state of every token: `[B, N, L, D]` (with a cut index prefix, of the tokens that are left)."""
        if self.demux is None:
            return h_BxLxD[:, None]
        return self.demux(h_BxLxD[:, self.offset :], row=h_BxLxD, stack=stack, train=train)

    def tag(self, h_BxLxD: Array, train: bool = False) -> Array:
        """Tag logits of every token: `[B, N, L, C]`, float32."""
        return self.classifier(self.token_states(h_BxLxD, train), train)

    def replaced(self, h_BxLxD: Array, train: bool = False) -> Array:
        """ELECTRA's logits that a token was replaced: `[B, N, L]`, float32."""
        return self.replaced_head(self.token_states(h_BxLxD, train))

    def states(self, h_BxLxD: Array, train: bool = False) -> Array:
        """Guesses of a teacher's states of every token, from those of the last layer: `[B, N, L, D]`, float32."""
        return self.state_heads(self.token_states(h_BxLxD, train))

    def layer_states(self, h_KxBxPxD: Array) -> Array:
        """The same from chosen positions of the `K` layers below the last one: `[K, B, N, P, D]`, float32."""
        return self.state_heads.inner(h_KxBxPxD)

    def retrieve(self, h_BxLxD: Array, instance_BxL: Array, train: bool = False) -> Array:
        """Vocabulary logits of the chosen instance at every position: `[B, L', V]`, float32.

        Args:
          h_BxLxD: hidden states of the mixed rows.
          instance_BxL: which instance to read at each position.
          train: draw dropout from the stream `dropout`.
        """
        position = jnp.broadcast_to(jnp.arange(h_BxLxD.shape[1]), h_BxLxD.shape[:2])
        return self.predict_tokens(h_BxLxD, instance_BxL, position, train)

    def predict_tokens(self, h_BxLxD: Array, instance_BxP: Array, position_BxP: Array, train: bool = False) -> Array:
        """Vocabulary logits of chosen pairs of instance and position of the fed row: `[B, P, V]`, float32."""
        return self.decode(self.read(h_BxLxD, instance_BxP, position_BxP, train))

    def read(self, h_BxLxD: Array, instance_BxP: Array, position_BxP: Array, train: bool = False) -> Array:
        """What `decode` reads, of chosen pairs of instance and position of the fed row: `[B, P, D]`."""
        if self.demux is None:
            return jnp.take_along_axis(h_BxLxD, position_BxP[..., None], axis=1)
        return self.demux(h_BxLxD, (instance_BxP, position_BxP), stack="retrieval", train=train)

    def decode(self, states_BxPxD: Array) -> Array:
        """Vocabulary logits: `[B, P, V]`, float32."""
        return self.decoder(states_BxPxD, self.embeddings)


def call(model: nn.Module, params: Any, method: str, *args: Any, rngs: Mapping[str, Array] | None = None) -> Array:
    """One method of the network, applied: `call(model, params, "encode", inputs, mask)`."""
    return cast(Array, model.apply({"params": params}, *args, method=method, rngs=dict(rngs or {})))
