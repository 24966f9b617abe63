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

EMBED, BACKBONE, UNMIX = STAGES = ("embed and mix", "backbone", "demux and head")
WHOLE = "whole"  # The program of all stages.
TRACED_CALLS = 3


def stages(network: Network, groups: int) -> dict[str, Callable[[], Any]]:
    """Embedding with mixing, backbone, and unmixing with the head, each compiled by itself, on what the stage before gives.

    The whole program is faster than their sum where the compiler merges stages.

    Returns:
      Stage -> function without arguments that returns device arrays; the last one returns the logits.
    """
    model, params, objective = network.run.model, network.run.params, network.run.config.objective
    batch = network.prediction_batch(groups)
    mask = batch["mask"]

    def unmix(m: MultiplexedTransformer, h: Array, mask_BxNxL: Array) -> Array:
        return m.tag(h) if objective == "tagging" else m.classify(h, mask_BxNxL)

    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, function: Callable[..., Array], *args: Array) -> Array:
        compiled = jax.jit(nn.apply(function, model)).lower({"params": params}, *args).compile()
        calls[name] = lambda: compiled({"params": params}, *args)
        return calls[name]()

    x = add(EMBED, MultiplexedTransformer.enter, batch["inputs"], mask)
    h = add(BACKBONE, MultiplexedTransformer.process, x, mask)
    add(UNMIX, unmix, h, mask)
    return calls


def trace(folder: Path, calls: Mapping[str, Callable[[], Any]]) -> None:
    """Writes a trace of three calls each for TensorBoard or Perfetto, under their names."""
    with jax.profiler.trace(str(folder)):
        for name, call in calls.items():
            with jax.profiler.TraceAnnotation(name):
                for _ in range(TRACED_CALLS):
                    jax.block_until_ready(call())
