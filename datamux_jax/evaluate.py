"""Evaluation over a whole split: every example once a grouping, over several random groupings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax import distributed, metrics, saved, scoring, workdir
from datamux_jax.build import build_generator
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError, choose
from datamux_jax.progress import Progress
from datamux_jax.runs import Run, load_run


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
    config = run.config
    fmt = pipeline.format_of(config, run.path)
    if fmt != run.format:
        raise InputError(
            f"{run.path} does not read what its data source {config.data.source!r} gives: it was converted from a checkpoint, "
            "or trained with other versions of the data. Evaluate a run that was trained on that source."
        )
    splits = pipeline.splits_of(config, fmt)
    arrays = scoring.first_examples(splits[choose(splits, split, "The split")], config.eval.examples)
    step = scoring.scoring_step(config, run.model, build_generator(config, run.model))
    per_grouping = []
    progress = Progress(label, groupings)
    for seed in range(groupings):
        sums = scoring.score(step, run.params, arrays, config, run.mesh, seed=seed, every_slot=config.eval.every_slot)
        per_grouping.append(sums)
        progress.update(seed + 1)
    progress.close()
    scores = [metrics.means(sums) for sums in per_grouping]
    result: dict[str, Any] = dict(metrics.means(metrics.merge(per_grouping)))
    for name, values in list(result.items()):
        if isinstance(values, float):
            result[f"{name}_std"] = float(np.std([score[name] for score in scores]))
    return {
        "split": split,
        "examples": len(arrays["inputs"]),
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
        if old.get("step") == saved.chosen_step(path, config):
            return old
    result = evaluate(load_run(path), split=split, groupings=groupings, label=label)
    distributed.on_primary(lambda: workdir.write_json(file, result))
    return result
