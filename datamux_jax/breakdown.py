"""Where the time of a prediction goes: its stages as programs of their own, and a profiler's trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from datamux_jax.benchmark_networks import Network
from datamux_jax.layers import Array
from datamux_jax.model import MultiplexedTransformer

EMBED, MIX, BACKBONE, UNMIX = STAGES = ("embed", "mix", "backbone", "demux and head")
WHOLE = "whole"  # The program of all stages.
TRACED_CALLS = 3


def stages(network: Network, groups: int) -> dict[str, Callable[[], Any]]:
    """Embedding, mixing, backbone and unmixing with the head, each compiled by itself, on what the stage before gives.

    The whole program is faster than their sum where the compiler merges stages. The plain network has no mixing.

    Returns:
      Stage -> function without arguments that returns device arrays; the last one returns the logits.
    """
    model, params, objective = network.run.model, network.run.params, network.run.config.objective
    batch = network.prediction_batch(groups)
    mask = batch["mask"]

    def embed(m: MultiplexedTransformer, inputs: Array) -> Array:
        return m.embeddings(m.feed(inputs))

    def fed_mask(m: MultiplexedTransformer, mask_BxNxL: Array) -> Array:
        return mask_BxNxL if m.demux is None else m.demux.prefix_mask(mask_BxNxL)

    def mix(m: MultiplexedTransformer, x: Array, mask_BxNxL: Array) -> Array:
        assert m.mux is not None
        return m.embeddings.refine(m.mux(x, fed_mask(m, mask_BxNxL), False))

    def backbone(m: MultiplexedTransformer, x: Array, mask_BxNxL: Array) -> Array:
        everywhere = m.mux is not None and (m.attend_padding or not m.vocab_size)
        return m.backbone(x, None if everywhere else fed_mask(m, mask_BxNxL).max(axis=1), False)

    def unmix(m: MultiplexedTransformer, h: Array, mask_BxNxL: Array) -> Array:
        return m.tag(h) if objective == "tagging" else m.classify(h, mask_BxNxL)

    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, function: Callable[..., Array], *args: Array) -> Array:
        compiled = jax.jit(nn.apply(function, model)).lower({"params": params}, *args).compile()
        calls[name] = lambda: compiled({"params": params}, *args)
        return calls[name]()

    x = add(EMBED, embed, batch["inputs"])
    x = x[:, 0] if model.mux is None else add(MIX, mix, x, mask)
    h = add(BACKBONE, backbone, x, mask)
    add(UNMIX, unmix, h, mask)
    return calls


def trace(folder: Path, calls: Mapping[str, Callable[[], Any]]) -> None:
    """Writes a trace of three calls each for TensorBoard or Perfetto, under their names."""
    with jax.profiler.trace(str(folder)):
        for name, call in calls.items():
            with jax.profiler.TraceAnnotation(name):
                for _ in range(TRACED_CALLS):
                    jax.block_until_ready(call())
