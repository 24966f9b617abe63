"""Demultiplexers: one hidden row becomes `N`, `[B, L, D] -> [B, N, L, D]`. Table `DEMUX`.

All of them serve two uses, each with last layers of its own: `stack="task"` feeds classification, tagging and replaced-token
detection, `stack="retrieval"` feeds the vocabulary, for token retrieval and MLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from datamux_jax.families import SpecialTokens
from datamux_jax.layers import Array, Spec, dense, gelu, layer_norm, parameter
from datamux_jax.sharding import constrain

Select = tuple[Array, Array]


class Demultiplexer(nn.Module):
    """What all demultiplexers share.

    Attributes:
      spec: sizes; states are `spec.hidden_size` wide.
      num_instances: `N`.
      num_layers: `K` of `rsa`, dense layers before the last one.
      form: of `rsa`, see there.
      tokens: ids of what is put into a row; None: nothing is (feature inputs).
      cut: `index` drops the last `N + 1` tokens of every sequence, so that the length stays `L` (as published pre-training does).
      keep_first: leave the token at position 0 alone (as published ELECTRA fine-tuning does).
    """

    spec: Spec
    num_instances: int
    num_layers: int = 2
    form: str = "paper"
    tokens: SpecialTokens | None = None
    cut: bool = False
    keep_first: bool = False

    @property
    def offset(self) -> int:
        """Number of prefix positions: token `j` of an instance stands at position `offset + j`."""
        return 0

    @property
    def read_position(self) -> int:
        """Position that sequence classification reads."""
        return 0

    def first_token(self) -> int | None:
        """What every sequence starts with, put over the token that stands there; None: it stays."""
        return self.tokens.cls if self.tokens else None

    def prefix(self, tokens_BxNxL: Array) -> Array:
        """The tokens that the network is fed: `[B, N, L']`."""
        first = None if self.keep_first else self.first_token()
        return tokens_BxNxL if first is None else jnp.asarray(tokens_BxNxL).at[..., 0].set(first)

    def prefix_mask(self, mask_BxNxL: Array) -> Array:
        """The mask of the fed tokens: `[B, N, L']`."""
        return mask_BxNxL

    def __call__(
        self,
        h_BxLxD: Array,
        select: Select | None = None,
        *,
        row: Array | None = None,
        stack: str = "task",
        train: bool = False,
    ) -> Array:
        """
        Args:
          h_BxLxD: states to demultiplex: hidden states of the mixed rows, or some pooled from them.
          select: None, or `(instance, position)`, both integer `[B, P]`: only these pairs are demultiplexed.
          row: hidden states of the whole rows, `[B, L', D]`, if `h_BxLxD` is something else. `index` reads its prefix there.
          stack: `task` or `retrieval`, which last layers to use.
          train: draw dropout from the stream `dropout`.

        Returns:
          `[B, N, L, D]`, or `[B, P, D]` for selected pairs.
        """
        return constrain(self.unmix(constrain(h_BxLxD), select, h_BxLxD if row is None else row, stack, train))

    def unmix(self, h_BxLxD: Array, select: Select | None, row: Array, stack: str, train: bool) -> Array:
        """What a demultiplexer computes; arguments and result as for `__call__`, with `row` always given."""
        raise NotImplementedError


def over_rows(unmix: Callable[..., Array], module: nn.Module, a: Array, c_BxLxD: Array, train: bool) -> Array:
    """`unmix(module, a_D, c_LxD, train)`, written for one instance of one group, mapped over instances, then groups.

    Args:
      unmix: the function.
      module: whose parameters it uses.
      a: private half of the first layer, `[N, D]`, or `[B, N, D]` where it depends on the row.
      c_BxLxD: shared half.
      train: passed on.

    Returns:
      `[B, N, L, D]`. What does not depend on a mapped axis is computed once.
    """

    def one(module: nn.Module, a_D: Array, c_LxD: Array) -> Array:
        return unmix(module, a_D, c_LxD, train)

    mapped: Any = functools.partial(nn.vmap, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True})
    over_instances = mapped(one, in_axes=(0, None))
    return mapped(over_instances, in_axes=(0 if a.ndim == 3 else None, 0))(module, a, c_BxLxD)


def chosen(c_BxLxD: Array, position_BxP: Array) -> Array:
    return jnp.take_along_axis(c_BxLxD, position_BxP[..., None], axis=1)


class RSA(Demultiplexer):
    """The RSA-inspired demultiplexer of MUX-PLMs (section 3.2; `index_pos` in published configs).

    Every instance has a private key vector `k_i`, learned. From `[k_i ; h]` a stack of dense layers computes the state of
    instance `i`. The first layer is `A k_i + C h + b`: `C h` is shared by all instances and `A k_i` by all positions, so nothing
    of shape `[B, N, L, 2D]` exists. The last layer of the stack (`task_out`, `retrieval_out`) belongs to one use;
    the keys and the layers before are shared by both.

    `form` says how the `K` layers before the last one are put together:

    - `paper`: `x = LN(gelu(dense(x)))`, with a residual from the second layer on and around the last one, in both stacks.
    - `electra`: as the released MUX-ELECTRA. Task: layers `1 .. K-1`, with dropout in the place of LayerNorm. Retrieval: as `paper`.
    - `bert`: as the released MUX-BERT. Task: as `electra`. Retrieval: two layers whatever `K` is, and no residuals.
    """

    def setup(self) -> None:
        spec, width = self.spec, self.spec.hidden_size
        self.keys = parameter(self, "keys", nn.initializers.normal(1.0), ("instances", "embed"), (self.num_instances, width))
        self.key_in = dense(spec, width, ("embed", None), use_bias=False)
        self.state_in = dense(spec, width, ("embed", None))
        self.hidden = [dense(spec, width, ("embed", None)) for _ in range(self.num_layers - 1)]
        self.norms = [layer_norm(spec) for _ in range(self.num_layers)]
        self.task_out, self.task_norm = dense(spec, width, ("embed", None)), layer_norm(spec)
        self.retrieval_out, self.retrieval_norm = dense(spec, width, ("embed", None)), layer_norm(spec)
        self.dropout = nn.Dropout(spec.dropout_rate)

    def unmix(self, h_BxLxD: Array, select: Select | None, row: Array, stack: str, train: bool) -> Array:
        del row
        a_NxD = self.key_in(self.keys.astype(h_BxLxD.dtype))
        c_BxLxD = self.state_in(h_BxLxD)
        if self.is_initializing():
            # A form may leave layers out that a published checkpoint has; they exist, unused, in all forms.
            for layer in (*self.hidden, *self.norms):
                layer(c_BxLxD)
        of_stack = RSA.unmix_task if stack == "task" else RSA.unmix_retrieval
        if select is not None:
            return of_stack(self, a_NxD[select[0]], chosen(c_BxLxD, select[1]), train)
        return over_rows(of_stack, self, a_NxD, c_BxLxD, train)

    def unmix_task(self, a: Array, c: Array, train: bool) -> Array:
        """The task stack after the first matrix product, for one instance: `a` `[D]`, `c` `[L, D]` -> `[L, D]`."""
        if self.form == "paper":
            x = self._normed_layers(a, c)
        else:
            x = self.dropout(gelu(a + c), deterministic=not train)
            for layer in self.hidden[:-1]:
                x = x + self.dropout(gelu(layer(x)), deterministic=not train)
        return x + self.task_norm(gelu(self.task_out(x)))

    def unmix_retrieval(self, a: Array, c: Array, train: bool) -> Array:
        """The same for retrieval and MLM."""
        del train
        if self.form == "bert":
            x = self.norms[0](gelu(a + c))
            x = self.norms[1](gelu(self.hidden[0](x)))
            return self.retrieval_norm(gelu(self.retrieval_out(x)))
        x = self._normed_layers(a, c)
        return x + self.retrieval_norm(gelu(self.retrieval_out(x)))

    def _normed_layers(self, a: Array, c: Array) -> Array:
        x = self.norms[0](gelu(a + c))
        for layer, norm in zip(self.hidden, self.norms[1:], strict=True):
            x = x + norm(gelu(layer(x)))
        return x


class IndexStack(nn.Module):
    """`LN(gelu(A p + C h + b))`: one dense layer over `[p ; h]`, in its two halves."""

    spec: Spec

    def setup(self) -> None:
        width = self.spec.hidden_size
        self.key_in = dense(self.spec, width, ("embed", None), use_bias=False)
        self.state_in = dense(self.spec, width, ("embed", None))
        self.norm = layer_norm(self.spec)

    def halves(self, p: Array, h: Array) -> tuple[Array, Array]:
        return self.key_in(p), self.state_in(h)

    def unmix(self, a: Array, c: Array, train: bool) -> Array:
        del train
        return self.norm(gelu(a + c))


class Index(Demultiplexer):
    """The index-embedding demultiplexer (DataMUX, section 3.2, "Index Embeddings").

    Every sequence gets a prefix of `N` tokens, filler but for the index token at its own position `i`, then one CLS-like token.
    `p_i = h[:, i]`, what the network made of the index token, then tells what is instance `i`'s in every other state.
    """

    def setup(self) -> None:
        self.task = IndexStack(self.spec)
        self.retrieval = IndexStack(self.spec)

    @property
    def offset(self) -> int:
        return self.num_instances + 1

    @property
    def read_position(self) -> int:
        return self.num_instances

    def prefix(self, tokens_BxNxL: Array) -> Array:
        n, tokens = self.num_instances, self.tokens
        assert tokens is not None, "build() refuses index without tokens"
        own = jnp.eye(n, dtype=bool)
        head = jnp.where(own, tokens.index - jnp.arange(n), tokens.filler)
        head = jnp.concatenate([head, jnp.full((n, 1), tokens.index_cls)], axis=1).astype(tokens_BxNxL.dtype)
        head_BxNxP = jnp.broadcast_to(head, (tokens_BxNxL.shape[0], *head.shape))
        body = tokens_BxNxL[..., : tokens_BxNxL.shape[-1] - self.offset] if self.cut else tokens_BxNxL
        return jnp.concatenate([head_BxNxP, body], axis=-1)

    def prefix_mask(self, mask_BxNxL: Array) -> Array:
        if self.cut:  # As published: the mask is not moved. Packed text, for which cutting is meant, has no padding.
            return mask_BxNxL
        ones = jnp.ones((*mask_BxNxL.shape[:2], self.offset), mask_BxNxL.dtype)
        return jnp.concatenate([ones, mask_BxNxL], axis=-1)

    def unmix(self, h_BxLxD: Array, select: Select | None, row: Array, stack: str, train: bool) -> Array:
        layers = self.task if stack == "task" else self.retrieval
        p_BxNxD = row[:, : self.num_instances]
        a_BxNxD, c_BxLxD = layers.halves(p_BxNxD, h_BxLxD)
        if select is not None:
            return layers.unmix(chosen(a_BxNxD, select[0]), chosen(c_BxLxD, select[1]), train)
        return over_rows(IndexStack.unmix, layers, a_BxNxD, c_BxLxD, train)


class InstanceLayer(nn.Module):
    """`LN(gelu(W dropout(h)))`, one instance's own layer."""

    spec: Spec

    def setup(self) -> None:
        self.dense = dense(self.spec, self.spec.hidden_size, ("embed", None))
        self.norm = layer_norm(self.spec)
        self.dropout = nn.Dropout(self.spec.dropout_rate)

    def __call__(self, h: Array, train: bool) -> Array:
        return self.norm(gelu(self.dense(self.dropout(h, deterministic=not train))))


class MLP(Demultiplexer):
    """Per-instance layers (DataMUX, section 3.2, "MLP Demuxing"): `LN_i(gelu(W_i dropout(h)))`.

    Retrieval has layers of its own and a shared one after them. The hidden layer of the task lies in the head.
    """

    def setup(self) -> None:
        layers: Any = nn.vmap(
            InstanceLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(None, None),
            out_axes=1,
            axis_size=self.num_instances,
            metadata_params={nn.PARTITION_NAME: "instances"},
        )
        self.task = layers(self.spec)
        self.retrieval = layers(self.spec)
        self.retrieval_out = dense(self.spec, self.spec.hidden_size, ("embed", None))
        self.retrieval_norm = layer_norm(self.spec)

    def first_token(self) -> int | None:
        return self.tokens.mlp_first if self.tokens else None

    def unmix(self, h_BxLxD: Array, select: Select | None, row: Array, stack: str, train: bool) -> Array:
        del row
        x = (self.task if stack == "task" else self.retrieval)(h_BxLxD, train)
        if select is not None:
            # Every instance has matrices of its own: computing all of them is cheaper than gathering matrices by position.
            group = jnp.arange(x.shape[0])[:, None]
            x = x[group, select[0], select[1]]
        return x if stack == "task" else self.retrieval_norm(gelu(self.retrieval_out(x)))


# `none` is the plain network.
DEMUX: dict[str, type[Demultiplexer] | None] = {"none": None, "rsa": RSA, "index": Index, "mlp": MLP}
RSA_FORMS = ("paper", "bert", "electra")
