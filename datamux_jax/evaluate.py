"""Evaluation over a whole split: every example once a grouping, over several random groupings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamux_jax import distributed, grouping, losses, metrics, predicted, saved, scoring, workdir
from datamux_jax.build import build_second
from datamux_jax.data import pipeline
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.errors import InputError, choose
from datamux_jax.progress import Progress
from datamux_jax.runs import Run, load_run

NAME = "metrics"


def examples_of(run: Run, split: str, count: int) -> Arrays:
    """The first `count` examples (0: all) of a split of the run's data source.

    Raises:
      InputError: no such split, or the run reads something else than its source gives.
    """
    return _examples(run.path, run.config, run.format, split, count)


def _examples(path: Path, config: Any, read: Format, split: str, count: int) -> Arrays:
    """As `examples_of`, of the run in `path` that reads the format `read`; needs no checkpoint."""
    fmt = pipeline.format_of(config, path)
    if fmt != read:
        raise InputError(
            f"{path} does not read what its data source {config.data.source!r} gives: it was converted from a checkpoint, "
            "or trained with other versions of the data. Evaluate a run that was trained on that source."
        )
    splits = pipeline.splits_of(config, fmt)
    return scoring.first_examples(splits[choose(splits, split, "The split")], count)


def fingerprint(arrays: Arrays) -> str:
    """Hexadecimal hash of examples: another one for other inputs, labels, order or number."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def evaluate(
    run: Run, *, split: str, groupings: int, label: str = "evaluate", predictions: Path | None = None
) -> dict[str, Any]:
    """Scores every example of a split in each of `groupings` random groupings.

    With `config.eval.every_slot` each group is scored `N` times, its instances moved on by one slot each time: every example then
    stands in every slot, and slots are compared on the same examples.

    Args:
      run: a loaded run.
      split: of its data source.
      groupings: number of groupings; grouping `g` is drawn with the seed `g`.
      label: of the progress line.
      predictions: file to write those of grouping 0 to, see `predicted.write`.

    Returns:
      For each metric its mean over groupings, `NAME_std` (over groupings, population), `NAME_per_slot`; and what was evaluated.
      `metrics` names those of the task, the most important one first; `words_cut` counts the labelled words beyond the length.

    Raises:
      InputError: no such split, no groupings, or predictions that cannot be written.
    """
    config = run.config
    step = scoring.scoring_step(config, run.model, build_second(config, run.model))
    every_slot = config.eval.every_slot
    found = _groupings(run, step, split, groupings, label, predictions, every_slot=every_slot)
    totals, tasks = [one for one, _ in found.scores], [one for _, one in found.scores]
    return {
        **found.about,
        "every_slot": every_slot,
        **_summary(metrics.means(metrics.merge(totals)), list(zip(map(metrics.means, totals), tasks, strict=True))),
    }


def evaluate_ensemble(
    run: Run, ensemble: int, *, split: str, groupings: int, label: str = "evaluate", predictions: Path | None = None
) -> dict[str, Any]:
    """Like `evaluate`, but every example is fed `ensemble` times, in other slots and groups, and its outputs are averaged.

    Returns:
      As `evaluate`, of the task's metrics alone, without slots; and `ensemble`.

    Raises:
      InputError: as `evaluate`, or `ensemble` does not divide the run's N, or the run learned no task.
    """
    config = run.config
    check_ensemble(ensemble, config)
    step = scoring.scoring_step(config, run.model, None, logits=True)
    found = _groupings(run, step, split, groupings, label, predictions, ensemble=ensemble)
    summary = _summary({}, [({}, tasks) for _, tasks in found.scores])
    return {**found.about, "ensemble": ensemble, **{name: value for name, value in summary.items() if "_per_slot" not in name}}


class _Groupings(NamedTuple):
    """What was evaluated, and of each grouping its sums and its task metrics."""

    about: dict[str, Any]
    scores: list[tuple[metrics.Totals, dict[str, Any]]]


def _groupings(
    run: Run,
    step: scoring.Step,
    split: str,
    groupings: int,
    label: str,
    predictions: Path | None,
    *,
    every_slot: bool = False,
    ensemble: int = 1,
) -> _Groupings:
    """Scores a split in each of `groupings` random groupings; see `evaluate` and `scoring.score`."""
    if groupings < 1:
        raise InputError(f"groupings = {groupings} leaves nothing to measure. Ask for at least 1.")
    config = run.config
    if predictions is not None:
        check_predictions(predictions, config)
    arrays, fmt = examples_of(run, split, config.eval.examples), run.format
    about = {"split": split, "examples": len(arrays["inputs"]), "fingerprint": fingerprint(arrays), "groupings": groupings}
    about |= {"step": run.step, "num_instances": config.num_instances}
    slots = config.num_instances if ensemble == 1 else 0  # Of an ensemble every example stood in several.
    scores = []
    progress = Progress(label, groupings)
    for seed in range(groupings):
        scored = scoring.score(step, run.params, arrays, config, run.mesh, seed=seed, every_slot=every_slot, ensemble=ensemble)
        scores.append((scored.totals, predicted.numbers(scored, arrays, fmt, slots)))
        if seed == 0:
            about |= _about(scored, arrays, fmt)
            if predictions is not None:
                _write_predictions(predictions, scored, arrays, fmt)
        progress.update(seed + 1)
        distributed.stop_if_asked("in the evaluation")
    progress.close()
    return _Groupings(about, scores)


def check_ensemble(ensemble: int, config: Any) -> None:
    """Raises InputError unless a run with `config` can be evaluated as an ensemble of `ensemble`."""
    if config.objective not in losses.TASK_LOSSES:
        raise InputError(
            f"ensemble = {ensemble} averages the outputs of a task, but objective = {config.objective!r} has none. Evaluate a run of "
            f"{', '.join(losses.TASK_LOSSES)}, or leave ensemble out."
        )
    grouping.check_ensemble(ensemble, config.num_instances)


def _about(scored: scoring.Scored, arrays: Arrays, fmt: Format) -> dict[str, Any]:
    if scored.outputs is None:
        return {"metrics": []}
    cut = {"words_cut": predicted.words_cut(scored, arrays)} if fmt.token_labels else {}
    return {"metrics": list(fmt.metrics), **cut}


def _write_predictions(path: Path, scored: scoring.Scored, arrays: Arrays, fmt: Format) -> None:
    distributed.on_primary(lambda: predicted.write(path, scored, arrays, fmt))


def _summary(merged: dict[str, Any], scores: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Numbers of all groupings together, and how much they differ.

    Args:
      merged: means of the sums of all groupings.
      scores: of each grouping the means of its sums, and its task metrics.
    """
    result = {**merged, **{name: _mean([tasks[name] for _, tasks in scores]) for name in scores[0][1]}}
    for name, value in list(result.items()):
        if isinstance(value, float):
            result[f"{name}_std"] = float(np.std([(sums | tasks)[name] for sums, tasks in scores]))
    return result


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of lists of numbers, entry by entry; None counts as nothing."""
    if isinstance(values[0], list):
        return [_mean(slot) for slot in zip(*values, strict=True)]
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def check_predictions(path: Path, config: Any) -> None:
    """Checks, before any work, that predictions of the run or experiment with `config` can be written to `path`.

    Raises:
      InputError: they cannot, or there are none.
    """
    if config.runs:
        raise InputError(
            f"--predictions={path} takes those of one run, but the --workdir is an experiment of several: "
            f"{', '.join(config.runs)}. Give the folder of one of them."
        )
    if config.objective not in losses.TASK_LOSSES:
        raise InputError(
            f"--predictions={path} has nothing to hold: a run with objective = {config.objective!r} predicts no labels. Evaluate a run "
            f"of {', '.join(losses.TASK_LOSSES)}, or leave the flag out."
        )
    predicted.check_path(path)


def suffix(config: Any, split: str, groupings: int, ensemble: int = 1) -> str:
    """What tells the files of an evaluation with other settings than the config's from the usual ones."""
    usual = (split, groupings) == (config.eval.split, config.eval.groupings)
    return ("" if usual else f"-{split}-{groupings}") + (f"-ensemble-{ensemble}" if ensemble > 1 else "")


def evaluate_run(
    path: Path,
    *,
    split: str = "",
    groupings: int = 0,
    label: str = "evaluate",
    predictions: Path | None = None,
    ensemble: int = 1,
) -> dict[str, Any]:
    """Evaluates the run in `path` and writes `metrics.json` there; other settings than those of its config get a file of their own.

    An evaluation that is on disk already is returned as it is, unless predictions are asked for: one of the same step, done in the same
    way on examples that are still the same.

    Raises:
      InputError: as `evaluate`, or the data are gone.
    """
    config = workdir.load_config(path)
    split, groupings = split or config.eval.split, groupings or config.eval.groupings
    file = path / f"{NAME}{suffix(config, split, groupings, ensemble)}.json"

    if predictions is None and (old := _before(path, config, file, split, groupings, ensemble)):
        if distributed.is_primary():
            step = old["step"]
            print(f"{label}  step {step} was scored before on the same examples: the numbers are those of {file}", flush=True)
        return old
    options: dict[str, Any] = {"split": split, "groupings": groupings, "label": label, "predictions": predictions}
    run = load_run(path)
    result = evaluate(run, **options) if ensemble == 1 else evaluate_ensemble(run, ensemble, **options)
    distributed.on_primary(lambda: workdir.write_json(file, result))
    return result


def _before(path: Path, config: Any, file: Path, split: str, groupings: int, ensemble: int) -> dict[str, Any] | None:
    """The evaluation in `file`, if one of the run as it is now, done in this way, would give the same."""
    wanted = {"step": saved.chosen_step(path, config), "split": split, "groupings": groupings}
    wanted |= {"every_slot": config.eval.every_slot} if ensemble == 1 else {}

    def fitting() -> dict[str, Any] | None:
        old = workdir.read_json(file) if file.exists() else {}
        same = all(old.get(name) == value for name, value in wanted.items())
        return old if same and "fingerprint" in old else None  # Earlier versions did not keep one.

    if (old := distributed.from_primary(fitting)) is None:
        return None
    arrays = distributed.primary_first(lambda: _examples(path, config, Format.load(path), split, config.eval.examples))
    return old if distributed.from_primary(lambda: old["fingerprint"] == fingerprint(arrays)) else None
