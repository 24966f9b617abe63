"""Layer by layer: how large activations are, and how widely attention looks (MUX-PLMs, "Muxology")."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from datamux_jax.analysis.parts import totals_of
from datamux_jax.data.formats import Arrays
from datamux_jax.layers import Block
from datamux_jax.model import MultiplexedTransformer, Network
from datamux_jax.runs import Run

Sums = dict[str, tuple[jax.Array, jax.Array]]


def layer_statistics(run: Run, arrays: Arrays, *, groupings: int = 1, label: str = "layers") -> dict[str, list[float]]:
    """Statistics of every encoder layer, means over all real positions of the (mixed) rows; of LeNet and MLP, over rows.

    Inputs are fed as they are, without masking or replacing tokens. A position is real if that of any instance in the row is.

    Args:
      run: a loaded run; `scan_layers` and `remat` are taken off, which changes no number and no parameter.
      arrays: examples, as `examples_of` gives them.
      groupings: random groupings to average over; grouping `g` is drawn with the seed `g`.
      label: of the progress line.

    Returns:
      Lists with one entry a layer: `norm`, the L2 norm of the layer's output; `magnitude`, the mean absolute value of its entries (what
      MUX-PLMs reports); `entropy`, of attention in nats, mean over heads; `largest_entropy`, that of uniform attention, the log of the
      number of positions that may be attended to. LeNet and MLP have `norm` and `magnitude` of their activations, after tanh.
    """
    if isinstance(run.model, MultiplexedTransformer):
        sums_of = functools.partial(layer_sums, unrolled(run.model))
    else:
        sums_of = functools.partial(image_layer_sums, run.model)
    step = jax.jit(lambda params, batch, key: (sums_of(params, batch), None))
    totals = totals_of(step, run, arrays, groupings, label)
    return {name: (total / count).tolist() for name, (total, count) in totals.items()}


def layers_of(run: Run) -> tuple[str, int]:
    """The kind of a run's layers and their number: what two runs must share whose layers are compared."""
    kind = run.config.model.backbone
    return kind, 0 if kind == "lenet" else run.config.model.num_layers


def image_layer_sums(model: Network, params: Any, batch: Any) -> Sums:
    """The sums of `layer_statistics` over a batch of images, of the backbone's layers in order, each `[layers]`."""
    kept = kept_of(model, params, batch, lambda module, method: isinstance(module, nn.Conv | nn.Dense) and method == "__call__")
    weight = batch["weight"].max(1)
    # Dictionaries of intermediates are in the order of the calls; tanh follows every layer of these networks.
    found = [jnp.tanh(layer["__call__"][0].reshape(len(weight), -1)) for layer in kept["network"]["backbone"].values()]
    return summed([size_of(x) for x in found], weight)


def kept_of(model: Network, params: Any, batch: Any, kept: Callable[[nn.Module, str], bool]) -> Any:
    """What the modules that `kept` names, and those that sow, leave behind when a batch is encoded."""
    _, found = model.apply(
        {"params": params},
        batch["inputs"],
        batch["mask"],
        method="encode",
        mutable=["intermediates"],
        capture_intermediates=kept,
    )
    return found["intermediates"]


def summed(by_layer: Sequence[dict[str, jax.Array]], weight: jax.Array) -> Sums:
    """The weighted sums of every number, with their counts, each `[layers]`."""
    count = jnp.full(len(by_layer), weight.sum())
    return {name: (jnp.stack([(values[name] * weight).sum() for values in by_layer]), count) for name in by_layer[0]}


def size_of(x: jax.Array) -> dict[str, jax.Array]:
    """Norm and magnitude of activations, over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return {"norm": jnp.linalg.norm(x, axis=-1), "magnitude": jnp.abs(x).mean(-1)}


def unrolled(model: MultiplexedTransformer) -> MultiplexedTransformer:
    """The same network with its layers called one by one: a scanned or rematerialised block is applied out of sight."""
    spec = dataclasses.replace(model.spec, scan=False, remat="none")
    return model.clone(parent=None, spec=spec, backbone=model.backbone.clone(parent=None, spec=spec))


def layer_sums(model: MultiplexedTransformer, params: Any, batch: Any) -> Sums:
    """The sums of `layer_statistics` over a batch, each `[layers]`; rows that only fill up count nothing."""
    kept = kept_of(model, params, batch, is_block)
    weight = model.fed_mask(batch["mask"]).max(1) * batch["weight"].max(1)[:, None]
    found = [kept["backbone"][f"layers_{i}"] for i in range(model.spec.num_layers)]
    return summed([of_layer(layer["__call__"][0], layer["attention"]["weights"][0]) for layer in found], weight)


def is_block(module: nn.Module, method: str) -> bool:
    """What is kept of a forward pass: the outputs of blocks. Attention keeps its weights by itself."""
    return isinstance(module, Block) and method == "__call__"


def of_layer(x_BxLxD: jax.Array, weights_BxHxLxL: jax.Array) -> dict[str, jax.Array]:
    """The numbers of one layer at every position, `[B, L]` each.

    Args:
      x_BxLxD: output of the layer.
      weights_BxHxLxL: its attention weights, `[B, heads, query, key]`.
    """
    weights = weights_BxHxLxL.astype(jnp.float32)
    # A key that no head gives any weight is masked: softmax leaves something everywhere else.
    allowed = (weights > 0).any(1).sum(-1)
    return {
        **size_of(x_BxLxD),
        "entropy": entr(weights).sum(-1).mean(1),
        "largest_entropy": jnp.log(allowed),
    }
