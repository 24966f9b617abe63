"""Scores parameters on examples: the core of evaluation, during training and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from datamux_jax import grouping, losses, metrics, sharding
from datamux_jax.data import buckets, pipeline
from datamux_jax.data.formats import Arrays
from datamux_jax.model import MultiplexedTransformer, Network, call
from datamux_jax.objectives import OBJECTIVES

Step = Callable[[Any, Any, jax.Array], tuple[Any, jax.Array | None]]
# What is fetched of a task's outputs: class logits, a number, one tag a position.
FETCHED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "classification": lambda logits: logits,
    "regression": lambda numbers: numbers,
    "tagging": lambda logits: logits.argmax(-1),
}


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one pass over examples gave, or, in every slot, `N` passes.

    Attributes:
      totals: sums over all examples and passes.
      outputs: of the task, for every pass in the order of the examples: class logits `[passes, n, C]`, numbers `[passes, n]`, or tags
        `[passes, n, L]`; None where no task is scored. Of an ensemble there is one pass, the mean.
      slots: which slot each example stood in, `[passes, n]`; of an ensemble 0, for there were several; None with `outputs`.
    """

    totals: metrics.Totals
    outputs: np.ndarray | None
    slots: np.ndarray | None


def scoring_step(config: Any, model: Network, second: MultiplexedTransformer | None, *, logits: bool = False) -> Step:
    """The jitted function `(params, batch, key) -> (sums, outputs)` of what `config` trains for; `loss` is always among the sums.

    Pre-training is scored as it is trained, on what `key` draws, and has no outputs; everything else, retrieval beside the learning of
    states too, is scored on every token and draws nothing. With `logits`, for ensembles, the task alone is scored, and the outputs of
    tagging are logits `[B, N, L, C]`, not tags.
    """
    if config.objective in ("mlm", "electra", "states"):
        objective = OBJECTIVES[config.objective](model, config, second)

        def pretraining(params: Any, batch: Any, key: jax.Array) -> Any:
            sums = objective(params, batch, {"corruption": key}, False)[1]
            if config.objective == "states" and "retrieval_loss" in sums:
                h = call(model, params, "encode", batch["inputs"], batch["mask"])
                assert isinstance(model, MultiplexedTransformer), "validate() refuses others"
                sums |= losses.every_retrieval(model, params, h, batch)
            return sums, None

        return jax.jit(pretraining)
    retrieve = config.objective == "retrieval" or (config.retrieval_loss_coeff > 0 and not logits)

    def step(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        h = call(model, params, "encode", batch["inputs"], batch["mask"])
        sums: dict[str, Any] = {}
        outputs = None
        if retrieve:
            assert isinstance(model, MultiplexedTransformer), "validate() refuses others"
            sums |= losses.every_retrieval(model, params, h, batch)
            sums["loss"] = sums["retrieval_loss"]
        if config.objective in losses.TASK_LOSSES:
            task, outputs = losses.task_loss(config)(model, params, h, batch, {}, False)
            sums |= {**task, "loss": task["task_loss"]}
            # Where the groups are, so that every process finds the outputs of those that it reads.
            outputs = sharding.constrain(outputs if logits else FETCHED[config.objective](outputs))
        return sums, outputs

    return jax.jit(step)


def score(
    step: Step,
    params: Any,
    arrays: Arrays,
    config: Any,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    every_slot: bool = False,
    ensemble: int = 1,
) -> Scored:
    """Scores all examples, mixed in one random grouping: in length buckets, as in prediction, where the run was trained so.

    Args:
      step: from `scoring_step`.
      params: to score.
      arrays: one row an example.
      config: of the run; gives N and the size of batches.
      mesh: that `params` lie on.
      seed: of the grouping, and of what pre-training draws.
      every_slot: score each group `N` times, its instances moved on by one slot each time, so that every example stands in every slot.
      ensemble: `k`, feed every example `k` times, in other slots and groups each time, and average the outputs (MUX-PLMs,
        "ensembling"); `step` gives logits then, and not tags.
    """
    groups = sharding.eval_groups(config, mesh)
    mine = sharding.local_groups(mesh, groups)
    batches = pipeline.eval_batches(
        arrays, groups=groups, instances=config.num_instances, seed=seed, mine=mine, buckets=buckets.of(config, arrays)
    )
    passes = max(config.num_instances if every_slot else 1, ensemble)

    def arranged(array: np.ndarray, filled: int, time: int) -> np.ndarray:
        if ensemble == 1:
            return np.roll(array, time, axis=1)
        return array[grouping.moved(array.shape[0], array.shape[1], filled, time, ensemble)]

    rolled = (
        (arranged(rows, filled, time), {k: arranged(v, filled, time) for k, v in batch.items()})
        for rows, batch in batches
        for filled in (max(1, int((batch["weight"] > 0).any(1).sum())),)
        for time in range(passes)
    )
    total: metrics.Totals = {}
    fetched: list[np.ndarray] = []
    places: list[np.ndarray] = []

    def fetch(sums: Any, outputs: jax.Array | None, missing: int) -> None:
        nonlocal total
        total = metrics.merge([total, jax.device_get(sums)])
        if outputs is not None:
            here = sharding.fetch_batch(outputs)
            if config.objective == "tagging":  # Rows that were cut: padding has outputs nobody reads.
                here = np.pad(here, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * (here.ndim - 3)])
            fetched.append(here)

    pending = None
    for number, (rows, batch) in enumerate(rolled):
        with sharding.on_mesh(mesh):
            now = step(params, sharding.put_batch(batch, mesh, groups), jax.random.fold_in(jax.random.key(seed), number))
        if pending is not None:  # One late: the device works on the next batch while these numbers travel.
            fetch(*pending)
        pending = *now, arrays["inputs"].shape[1] - batch["inputs"].shape[2]
        places.append(np.where(batch["weight"] > 0, rows, -1).astype(np.int32))
    assert pending is not None, "a split has examples"
    fetch(*pending)
    if not fetched:
        return Scored(total, None, None)
    outputs, slots = _in_order(np.stack(fetched), np.stack(places), passes, len(arrays["inputs"]))
    if ensemble > 1:
        mean = outputs.mean(0, keepdims=True)
        return Scored(total, mean.argmax(-1) if config.objective == "tagging" else mean, np.zeros_like(slots[:1]))
    return Scored(total, outputs, slots)


def _in_order(outputs: np.ndarray, rows: np.ndarray, passes: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts outputs into the order of the examples, those of all processes together.

    Args:
      outputs: of the batches that this process read, `[batches, groups, N, ...]`.
      rows: the examples that they belong to, -1 for what only filled up.
      passes: how often each example was scored; the passes over a batch follow one another.
      examples: how many there are.

    Returns:
      Outputs `[passes, examples, ...]`, and the slots that the examples stood in, `[passes, examples]`.
    """
    if jax.process_count() > 1:
        outputs, rows = multihost_utils.process_allgather((outputs, rows), tiled=True)
    ordered = np.empty((passes, examples, *outputs.shape[3:]), outputs.dtype)
    slots = np.empty((passes, examples), np.int32)
    batch, group, slot = np.nonzero(rows >= 0)
    at = batch % passes, rows[batch, group, slot]
    ordered[at] = outputs[batch, group, slot]
    slots[at] = slot
    return ordered, slots


def first_examples(arrays: Arrays, count: int) -> Arrays:
    """The first `count` examples; all of them for 0."""
    return {name: array[:count] for name, array in arrays.items()} if count else arrays
