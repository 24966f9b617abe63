"""Demultiplexers: one hidden row becomes `N`, `[B, L, D] -> [B, N, L, D]`. Table `DEMUX`."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from datamux_jax.layers import Array, Spec, dense, gelu, layer_norm, parameter

Select = tuple[Array, Array]


class RSA(nn.Module):
    """The RSA-inspired demultiplexer of MUX-PLMs (section 3.2; `index_pos` in published configs).

    Every instance has a private key vector `k_i`, learned. From `[k_i ; h]` a stack of dense layers computes the state of
    instance `i`. The first layer is `A k_i + C h + b`: `C h` is shared by all instances and `A k_i` by all positions, so nothing
    of shape `[B, N, L, 2D]` exists. The last layer of the stack (`task_out`, `retrieval_out`) belongs to one use;
    the keys and the layers before are shared by both.

    Attributes:
      spec: sizes; keys and states are `spec.hidden_size` wide.
      num_instances: `N`.
      num_layers: `K`, dense layers before the last one.
      form: `released`: the task stack as in the published code, `gelu` layers without LayerNorm, of which layer `K` goes unused;
        `paper`: LayerNorm after every layer, all `K` layers used.
    """

    spec: Spec
    num_instances: int
    num_layers: int = 2
    form: str = "paper"

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

    def __call__(self, h_BxLxD: Array, select: Select | None = None, *, stack: str = "task", train: bool = False) -> Array:
        """
        Args:
          h_BxLxD: hidden states of mixed rows.
          select: None, or `(instance, position)`, both integer `[B, P]`: only these pairs are demultiplexed.
          stack: `task` or `retrieval`, which last layer to use.
          train: draw dropout from the stream `dropout`.

        Returns:
          `[B, N, L, D]`, or `[B, P, D]` for selected pairs.
        """
        a_NxD = self.key_in(self.keys.astype(h_BxLxD.dtype))
        c_BxLxD = self.state_in(h_BxLxD)
        if select is not None:
            instance_BxP, position_BxP = select
            return self.unmix(a_NxD[instance_BxP], jnp.take_along_axis(c_BxLxD, position_BxP[..., None], axis=1), stack, train)

        def unmix(module: RSA, a_D: Array, c_LxD: Array) -> Array:
            return module.unmix(a_D, c_LxD, stack, train)

        # Written for one instance of one group; mapped over instances, then groups. What does not depend on the mapped
        # axis (`a` over groups, `c` over instances) is computed once.
        mapped = functools.partial(nn.vmap, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True})
        over_instances = mapped(unmix, in_axes=(0, None))
        over_groups = mapped(over_instances, in_axes=(None, 0))
        return over_groups(self, a_NxD, c_BxLxD)

    def unmix(self, a: Array, c: Array, stack: str, train: bool) -> Array:
        """The stack after the first matrix product, for one instance: keys `a` `[D]`, states `c` `[L, D]` -> `[L, D]`."""

        def after(x: Array, layer: int) -> Array:
            if released:
                return self.dropout(x, deterministic=not train)
            return self.norms[layer](x)

        released = stack == "task" and self.form == "released"
        x = after(gelu(a + c), 0)
        for k, layer in enumerate(self.hidden[: len(self.hidden) - released], start=1):
            x = x + after(gelu(layer(x)), k)
        out, norm = (self.task_out, self.task_norm) if stack == "task" else (self.retrieval_out, self.retrieval_norm)
        return x + norm(gelu(out(x)))


DEMUX = {"none": None, "rsa": RSA}
