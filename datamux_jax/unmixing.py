"""Demultiplexers for outputs of any rank: `[B, *out, D] -> [B, N, *out, D]`. Table `UNMIXING`.

They act on the last axis, at every position likewise; `multiplexed.Multiplexed` uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from datamux_jax.backbones.vision import dense
from datamux_jax.demux import RSA
from datamux_jax.errors import InputError
from datamux_jax.layers import Array, Spec


class _Layers(nn.Module):
    """The layers of one instance."""

    features: int
    num_layers: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, h: Array) -> Array:
        for _ in range(self.num_layers):
            h = self.activation(dense(h, self.features)(h))
        return h


class InstanceMLP(nn.Module):
    """Dense layers that every instance has for itself: `z_i = tanh(W_i h + b_i)` (DataMUX for images; section 3.2, "MLP Demuxing").

    Attributes:
      num_instances: `N`.
      features: width of the layers; 0: that of the input.
      num_layers: of each instance.
      activation: after each layer.
    """

    num_instances: int
    features: int = 0
    num_layers: int = 1
    activation: Callable[[Array], Array] = nn.tanh

    @nn.compact
    def __call__(self, h: Array) -> Array:
        check_rank(self, h)
        layers: Any = nn.vmap(
            _Layers,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=self.num_instances,
        )
        return layers(self.features or h.shape[-1], self.num_layers, self.activation, name="instances")(h)


class Keys(nn.Module):
    """The RSA-inspired demultiplexer of MUX-PLMs (section 3.2): from `[k_i ; h]`, with one learned key an instance; see `demux.RSA`.

    All instances share its layers, so that it grows by one vector for each more.

    Attributes:
      num_instances: `N`.
      num_layers: `K`, layers before the last one.
      form: see `demux.RSA`.
    """

    num_instances: int
    num_layers: int = 2
    form: str = "paper"

    @nn.compact
    def __call__(self, h: Array) -> Array:
        check_rank(self, h)
        width = h.shape[-1]
        spec = Spec(width, 0, 1, 0, dropout_rate=0.0, layer_norm_eps=1e-6, init_stddev=0.0, dtype=h.dtype.name)
        rsa = RSA(spec, self.num_instances, num_layers=self.num_layers, form=self.form, name="rsa")
        # Its rows of positions are whatever axes there are.
        z_BxNxPxD = rsa(h.reshape(h.shape[0], math.prod(h.shape[1:-1]), width))
        return z_BxNxPxD.reshape(h.shape[0], self.num_instances, *h.shape[1:])


def check_rank(demux: nn.Module, h: Array) -> None:
    """Raises InputError if `h` has no axis beside that of the groups."""
    if h.ndim < 2:
        raise InputError(
            f"The demux {type(demux).__name__} takes outputs [groups, ..., width], but the backbone gave shape {list(h.shape)}. Let it "
            "give a vector for each group."
        )


UNMIXING: dict[str, type[nn.Module]] = {"mlp": InstanceMLP, "rsa": Keys}
