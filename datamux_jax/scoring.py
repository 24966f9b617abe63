"""Scores parameters on examples: the core of evaluation, during training and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datamux_jax import losses, metrics, sharding
from datamux_jax.data import pipeline
from datamux_jax.model import MultiplexedTransformer, call
from datamux_jax.objectives import OBJECTIVES

Step = Callable[[Any, Any, jax.Array], Any]


def scoring_step(config: Any, model: MultiplexedTransformer, generator: MultiplexedTransformer | None) -> Step:
    """The jitted function `(params, batch, key) -> sums` of what `config` trains for; `loss` is always among them.

    Pre-training is scored as it is trained, on what `key` draws; everything else is scored on every token and draws nothing.
    """
    if config.objective in ("mlm", "electra"):
        objective = OBJECTIVES[config.objective](model, config, generator)
        return jax.jit(lambda params, batch, key: objective(params, batch, {"corruption": key}, False)[1])
    retrieve = config.objective == "retrieval" or config.retrieval_loss_coeff > 0

    def step(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        h = call(model, params, "encode", batch["inputs"], batch["mask"])
        sums: dict[str, Any] = {}
        if retrieve:
            sums |= losses.every_retrieval(model, params, h, batch)
            sums["loss"] = sums["retrieval_loss"]
        if config.objective in losses.TASK_LOSSES:
            sums |= losses.TASK_LOSSES[config.objective](model, params, h, batch, {}, False)
            sums["loss"] = sums["task_loss"]
        return sums

    return jax.jit(step)


def score(
    step: Step,
    params: Any,
    arrays: pipeline.Arrays,
    config: Any,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    every_slot: bool = False,
) -> metrics.Totals:
    """Sums over all examples, mixed in one random grouping.

    Args:
      step: from `scoring_step`.
      params: to score.
      arrays: one row an example.
      config: of the run; gives N and the size of batches.
      mesh: that `params` lie on.
      seed: of the grouping, and of what pre-training draws.
      every_slot: score each group `N` times, its instances moved on by one slot each time, so that every example stands in every slot.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    groups = -(-config.eval.batch_groups // shards) * shards
    mine = sharding.local_groups(mesh, groups)
    batches = pipeline.eval_batches(arrays, groups=groups, instances=config.num_instances, seed=seed, mine=mine)
    shifts = config.num_instances if every_slot else 1
    rolled = ({k: np.roll(v, shift, axis=1) for k, v in batch.items()} for _, batch in batches for shift in range(shifts))
    total: metrics.Totals = {}
    pending = None
    for number, batch in enumerate(rolled):
        with sharding.on_mesh(mesh):
            sums = step(params, sharding.put_batch(batch, mesh, groups), jax.random.fold_in(jax.random.key(seed), number))
        if pending is not None:  # One late: the device works on the next batch while these numbers travel.
            total = metrics.merge([total, jax.device_get(pending)])
        pending = sums
    return metrics.merge([total, jax.device_get(pending)])


def first_examples(arrays: pipeline.Arrays, count: int) -> pipeline.Arrays:
    """The first `count` examples; all of them for 0."""
    return {name: array[:count] for name, array in arrays.items()} if count else arrays
