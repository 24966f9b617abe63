"""Evaluation over a whole split: every example once a grouping, over several random groupings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datamux_jax import checkpoint, losses, metrics, sharding, workdir
from datamux_jax.build import build_generator
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError, choose
from datamux_jax.model import call
from datamux_jax.objectives import OBJECTIVES
from datamux_jax.progress import Progress
from datamux_jax.runs import Run, load_run


def evaluation_step(run: Run) -> Callable[[Any, Any, jax.Array], Any]:
    """The jitted function `(params, batch, key) -> sums` of what this run was trained for.

    Pre-training is scored as it is trained, on what `key` draws; everything else is scored on every token and draws nothing.
    """
    config, model = run.config, run.model
    if config.objective in ("mlm", "electra"):
        objective = OBJECTIVES[config.objective](model, config, build_generator(config, model))
        return jax.jit(lambda params, batch, key: objective(params, batch, {"corruption": key}, False)[1])
    retrieve = config.objective == "retrieval" or config.retrieval_loss_coeff > 0

    def step(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        h = call(model, params, "encode", batch["inputs"], batch["mask"])
        sums: dict[str, Any] = {}
        if config.objective in losses.TASK_LOSSES:
            sums |= losses.TASK_LOSSES[config.objective](model, params, h, batch, {}, False)[1]
        if retrieve:
            sums |= losses.every_retrieval(model, params, h, batch)
        return sums

    return jax.jit(step)


def evaluate(run: Run, *, split: str, groupings: int, label: str = "evaluate") -> dict[str, Any]:
    """Scores every example of a split in each of `groupings` random groupings.

    With `config.eval.every_slot` each group is scored `N` times, its instances moved on by one slot each time: every example then
    stands in every slot, and slots are compared on the same examples.

    Args:
      run: a loaded run.
      split: of its data source.
      groupings: number of groupings; grouping `g` is drawn with the seed `g`.
      label: of the progress line.

    Returns:
      For each metric its mean over groupings, `NAME_std` (over groupings, population), `NAME_per_slot`; and what was evaluated.

    Raises:
      InputError: no such split, or no groupings.
    """
    if groupings < 1:
        raise InputError(f"--groupings={groupings} leaves nothing to measure. Ask for at least 1.")
    fmt, splits = pipeline.load(run.config)
    if fmt != run.format:
        raise InputError(
            f"{run.path} does not read what its data source {run.config.data.source!r} gives: it was converted from a checkpoint, "
            "or trained with other versions of the data. Evaluate a run that was trained on that source."
        )
    arrays = splits[choose(splits, split, "The split")]
    step = evaluation_step(run)
    groups = -(-run.config.eval.batch_groups // run.mesh.size) * run.mesh.size
    per_grouping = []
    progress = Progress(label, groupings)
    for seed in range(groupings):
        batches = pipeline.eval_batches(arrays, groups=groups, instances=run.config.num_instances, seed=seed)
        shifts = run.config.num_instances if run.config.eval.every_slot else 1
        rolled = ({k: np.roll(v, shift, axis=1) for k, v in batch.items()} for _, batch in batches for shift in range(shifts))
        parts = [
            step(run.params, sharding.put_batch(batch, run.mesh), jax.random.fold_in(jax.random.key(seed), number))
            for number, batch in enumerate(rolled)
        ]
        per_grouping.append(metrics.merge(jax.device_get(parts)))
        progress.update(seed + 1)
    progress.close()
    scores = [metrics.means(sums) for sums in per_grouping]
    result: dict[str, Any] = dict(metrics.means(metrics.merge(per_grouping)))
    for name, values in list(result.items()):
        if isinstance(values, float):
            result[f"{name}_std"] = float(np.std([score[name] for score in scores]))
    return {
        "split": split,
        "examples": len(arrays["mask"]),
        "groupings": groupings,
        "every_slot": run.config.eval.every_slot,
        "step": run.step,
        "num_instances": run.config.num_instances,
        **result,
    }


def suffix(config: Any, split: str, groupings: int) -> str:
    """What tells the files of an evaluation with other settings than the config's from the usual ones."""
    usual = (split, groupings) == (config.eval.split, config.eval.groupings)
    return "" if usual else f"-{split}-{groupings}"


def evaluate_run(path: Path, *, split: str = "", groupings: int = 0, label: str = "evaluate") -> dict[str, Any]:
    """Evaluates the run in `path` and writes `eval.json` there; other settings than those of its config get a file of their own.

    An evaluation that is on disk already, of the same step, is returned as it is.
    """
    config = workdir.load_config(path)
    split, groupings = split or config.eval.split, groupings or config.eval.groupings
    file = path / f"eval{suffix(config, split, groupings)}.json"
    if file.exists():
        old = workdir.read_json(file)
        if old.get("step") == checkpoint.newest_step(path):
            return old
    result = evaluate(load_run(path), split=split, groupings=groupings, label=label)
    workdir.write_json(file, result)
    return result
