"""The bidirectional post-LN Transformer encoder (BERT; RoBERTa and ELECTRA share its blocks)."""

from __future__ import annotations

import flax.linen as nn

from datamux_jax.layers import Array, Block, Spec, dense


class Encoder(nn.Module):
    """`num_layers` post-LN blocks over embeddings: `[B, L, E] -> [B, L, D]`.

    With factorised embeddings (`E != D`) a dense layer projects to `D` first, as in ELECTRA.
    """

    spec: Spec

    def setup(self) -> None:
        if self.spec.width != self.spec.hidden_size:
            self.project = dense(self.spec, self.spec.hidden_size, (None, "embed"))
        self.layers = [Block(self.spec) for _ in range(self.spec.num_layers)]

    def __call__(self, x_BxLxE: Array, mask: Array | None = None, train: bool = False) -> Array:
        """
        Args:
          x_BxLxE: embeddings, mixed or plain.
          mask: `[B, L]`, or None to attend everywhere. A mixed row takes None: padding of one instance is content of another.
          train: draw dropout from the stream `dropout`.
        """
        h = x_BxLxE if self.spec.width == self.spec.hidden_size else self.project(x_BxLxE)
        for layer in self.layers:
            h = layer(h, mask, train)
        return h
