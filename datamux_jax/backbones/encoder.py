"""The bidirectional post-LN Transformer encoder (BERT; RoBERTa and ELECTRA share its blocks)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.layers import Array, Block, Spec, dense

# What a block keeps for the backward pass; the rest is computed again there.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # Everything is kept.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # The products with parameters are kept.
    "full": jax.checkpoint_policies.nothing_saveable,  # Only the input of a block is kept.
}


class Encoder(nn.Module):
    """`num_layers` post-LN blocks over embeddings: `[B, L, E] -> [B, L, D]`.

    With factorised embeddings (`E != D`) a dense layer projects to `D` first, as in ELECTRA.

    Every layer has parameters of its own name, also where one block is compiled and scanned: a checkpoint does not depend on how it
    was trained. Scanning stacks them in every step, which costs a copy of the encoder's parameters.
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
          mask: `[B, L]`, or None to attend everywhere. In a mixed row padding of one instance is content of another.
          train: draw dropout from the stream `dropout`.
        """
        return self._run(x_BxLxE, mask, train)[0]

    def every_layer(self, x_BxLxE: Array, mask: Array | None = None, train: bool = False) -> Array:
        """As a call, but the outputs of all layers, `[layers, B, L, D]`; the last one is what a call gives."""
        every = self._run(x_BxLxE, mask, train, keep=True)[1]
        assert every is not None
        return every

    def _run(self, x_BxLxE: Array, mask: Array | None, train: bool, keep: bool = False) -> tuple[Array, Array | None]:
        """The last layer's output `[B, L, D]`, and with `keep` those of all layers, `[layers, B, L, D]`."""
        spec = self.spec
        h = x_BxLxE if spec.width == spec.hidden_size else self.project(x_BxLxE)
        keys = [None] * spec.num_layers
        if train and self.layers[0].draws:
            keys = list(jax.random.split(self.make_rng("dropout"), spec.num_layers))
        if self.is_initializing() or (spec.remat == "none" and not spec.scan):
            kept = []
            for layer, key in zip(self.layers, keys, strict=True):
                h = layer(h, mask, key)
                kept.append(h)
            return h, jnp.stack(kept) if keep else None
        block = Block(spec, parent=None)

        def apply(h: Array, layer: tuple[Any, Array | None]) -> tuple[Array, Array | None]:
            params, key = layer
            h = cast(Array, block.apply({"params": params}, h, mask, key))
            return h, h if keep else None

        if spec.remat != "none":
            # Inside a scan nothing can be merged with the forward pass by mistake.
            apply = jax.checkpoint(apply, policy=REMAT[spec.remat], prevent_cse=not spec.scan)
        layers = [(layer.variables["params"], key) for layer, key in zip(self.layers, keys, strict=True)]
        if spec.scan:
            return jax.lax.scan(apply, h, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
        kept = []
        for pair in layers:
            h, _ = apply(h, pair)
            kept.append(h)
        return h, jnp.stack(kept) if keep else None
