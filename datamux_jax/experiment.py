"""An experiment: several runs of one config, each trained and evaluated in its own folder, compared in one report.

A run may start from an earlier one (`init_from = "../n2-warmup"`), so stages and sweeps are written the same way. Everything
that is finished stays finished: the same command after an interruption goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from datamux_jax import distill, distributed, losses, report, saved, start, teacher, workdir
from datamux_jax.baselines import BASELINES
from datamux_jax.benchmark import throughput
from datamux_jax.config import validate
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError, choose
from datamux_jax.evaluate import check_ensemble, check_predictions, evaluate_run, suffix
from datamux_jax.plan import Plan, prepare
from datamux_jax.runs import load_run
from datamux_jax.train import train

MEASURED = "measured.json"


def expand(config: ml_collections.ConfigDict, flags: Mapping[str, Any] | None = None) -> dict[str, ml_collections.ConfigDict]:
    """The complete config of every run of an experiment, by name; `{"": config}` for a config without runs.

    Args:
      config: complete config; `config.overrides[name]` holds the keys in which a run differs.
      flags: dotted keys given on the command line; they hold for every run and beat its overrides.

    Raises:
      InputError: an override that is no config key, or has another type.
    """
    if not config.runs:
        return {"": config}
    if not isinstance(config.runs, tuple | list):
        raise InputError(f"runs = {config.runs!r} is no list of names. Leave it to the config file.")
    for name in (*config.runs, *config.overrides):
        if name not in config.runs or not re.fullmatch(r"[\w-]+", name) or name == saved.FOLDER:
            raise InputError(
                f"{name!r} is no name of a run, or only overrides name it. Run names are letters, digits, '_' and '-', and each key of "
                f"overrides is one of runs = {tuple(config.runs)}."
            )
    runs = {}
    for name in config.runs:
        run = config.copy_and_resolve_references()
        with run.unlocked():
            run.runs, run.overrides = (), ml_collections.ConfigDict()
        run.lock()
        changes = config.overrides[name].to_dict() if name in config.overrides else {}
        for key, value in workdir.flatten(changes).items():
            if key not in (flags or {}):
                set_key(run, key, value, f"overrides.{name}")
        runs[name] = run
    return runs


def set_key(config: ml_collections.ConfigDict, key: str, value: Any, where: str) -> None:
    """Sets a dotted key that exists already.

    Raises:
      InputError: it does not exist, or the value has another type.
    """
    *parents, leaf = key.split(".")
    node = config
    for part in parents:
        node = node[part] if isinstance(node, ml_collections.ConfigDict) and part in node else None
    if not isinstance(node, ml_collections.ConfigDict) or leaf not in node:
        raise InputError(f"{where} sets {key!r}, which is no config key. configs/common.py lists all keys.")
    try:
        node[leaf] = value
    except TypeError as error:
        raise InputError(
            f"{where} sets {key} = {value!r}, but it is of type {type(node[leaf]).__name__} (default {node[leaf]!r})."
        ) from error


def run(
    config: ml_collections.ConfigDict,
    folder: str | Path,
    flags: Mapping[str, Any] | None = None,
    profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates all runs of `config` below `folder`, measures throughput, writes and prints the report.

    Args:
      config: complete config.
      folder: the workdir; for an experiment, each run's folder lies below.
      flags: dotted config keys given on the command line.
      profile: first and last step of a profiler trace of every run.

    Returns:
      The report's contents.

    Raises:
      InputError: bad input; nothing has been written then.
      Interrupted: a signal came; the state is saved.
    """
    folder = Path(folder)
    distributed.check_same({"the config": repr(workdir.plain(config)), "the flags": repr(sorted((flags or {}).items()))})
    runs = expand(config, flags)
    steps = distributed.from_primary(lambda: {name: saved.newest_step(folder / name) for name in runs})
    for one in runs.values():
        validate(one)  # Of all runs, before the data of the first are read.
    needed = 0
    waiting: dict[Path, Any] = {}
    for name, one in runs.items():
        if steps[name] == one.steps:
            continue
        plan = distributed.primary_first(functools.partial(prepare, one, folder / name))
        needed += plan.missing_bytes(folder / name)
        if steps[name] is None:
            distributed.on_primary(functools.partial(_check_sources, plan, folder / name, waiting))
        waiting[Path(os.path.normpath(folder / name))] = one
    if config.baseline:
        choose(BASELINES, config.baseline, "The config value baseline =")
        for name, one in runs.items():
            if not pipeline.format_of(one, folder / name).vocab_size:
                raise InputError(
                    f"baseline = {config.baseline!r} reads texts, but data.source = {one.data.source!r} has none. Drop it."
                )
    scores: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        if config.runs:
            distributed.on_primary(lambda: stack.enter_context(workdir.claimed(folder, config, needed)))
        for name, one in runs.items():
            distributed.stop_if_asked(f"before {name or 'training'}")
            train(one, folder / name, label=name or "train", profile=profile)
            distributed.stop_if_asked(f"before the evaluation of {name or folder}")
            scores[name] = evaluate_run(folder / name, label=f"{name} evaluate".strip())
        return compare(folder, scored=scores)


def _check_sources(plan: Plan, run: Path, waiting: Mapping[Path, Any]) -> None:
    """Checks what a run starts and learns from. What an earlier run of the experiment has yet to make is checked when its turn comes.

    Args:
      plan: of the run.
      run: its folder.
      waiting: folders and configs of the runs that are trained before it.
    """
    config = plan.config

    def awaited(source: str) -> Any:
        return waiting.get(Path(os.path.normpath(run / source))) if source else None

    if awaited(config.init_from) is None:
        start.check(plan, run)
    if (taught := awaited(config.distill.teacher)) is None:
        start.check_teacher(plan, run)
        distill.check(plan, run)
    elif losses.has_teacher(config):
        distill.check_task(config, taught)
    else:
        teacher.check_config(config, taught)


def compare(
    folder: Path,
    *,
    split: str = "",
    groupings: int = 0,
    predictions: Path | None = None,
    scored: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Evaluates all runs of the experiment (or the single run) in `folder`, measures what is missing, writes the report.

    Args:
      folder: the workdir.
      split: to evaluate on; default: the config's.
      groupings: of the evaluation; default: the config's.
      predictions: file to write those of a single run to; none by default.
      scored: what `evaluate_run` gave of runs just now.

    Raises:
      InputError: no such folder or split, a run without a checkpoint, or predictions that cannot be written.
    """
    config = workdir.load_config(folder)
    split, groupings = split or config.eval.split, groupings or config.eval.groupings
    if predictions is not None:
        check_predictions(predictions, config)
    names = list(config.runs) or [""]
    options: dict[str, Any] = {"split": split, "groupings": groupings, "predictions": predictions}
    fresh = {
        name: score for name, score in (scored or {}).items() if (score["split"], score["groupings"]) == (split, groupings)
    }
    scores = {
        name: fresh[name] if name in fresh else evaluate_run(folder / name, label=f"{name} evaluate".strip(), **options)
        for name in names
    }
    configs = {name: workdir.load_config(folder / name) for name in names}
    measured = _measured(folder, config, configs, {name: score["step"] for name, score in scores.items()})
    contents = {"throughput": measured["throughput"]}
    if config.baseline:
        data = next(iter(scores.values()))["fingerprint"]
        contents["baseline"] = _baseline(folder, config, configs, measured, split, data)
    result: dict[str, Any] = {}

    def write() -> None:
        result.update(report.write(folder, config, scores, contents, configs, suffix(config, split, groupings)))

    distributed.on_primary(write)
    return result


def ensembles(
    folder: Path, ensemble: int, *, split: str = "", groupings: int = 0, predictions: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluates all runs of the experiment (or the single run) in `folder` that can be as ensembles, and prints a table.

    Each writes its `metrics-ensemble-K.json`. Runs of an experiment that learned no task, or whose N it does not divide, are left out.

    Args: as `compare`.

    Raises:
      InputError: as `compare`, or no run can be evaluated so.
    """
    config = workdir.load_config(folder)
    if predictions is not None:
        check_predictions(predictions, config)
    configs = {name: workdir.load_config(folder / name) for name in (list(config.runs) or [""])}
    fits = [n for n, one in configs.items() if one.objective in losses.TASK_LOSSES and one.num_instances % ensemble == 0]
    if not fits:
        check_ensemble(ensemble, list(configs.values())[-1])
    if left := [name for name in configs if name not in fits]:
        print(f"Left out: {', '.join(left)} ({ensemble} copies take a task, and an N that they divide).", flush=True)
    options: dict[str, Any] = {"split": split, "groupings": groupings, "predictions": predictions, "ensemble": ensemble}
    scores = {name: evaluate_run(folder / name, label=f"{name} evaluate".strip(), **options) for name in fits}
    header = ["run", "N", "copies", "metric", "value"]
    rows = [
        [name or "run", str(one["num_instances"]), str(ensemble), metric, report.with_std(one, metric)]
        for name, one in scores.items()
        for metric in one["metrics"]
    ]
    print("\n" + "\n".join(report.table(header, rows)), flush=True)
    return scores


def _measured(folder: Path, config: Any, configs: Mapping[str, Any], steps: Mapping[str, int]) -> dict[str, Any]:
    """What was measured beside accuracy, from disk if it belongs to the same checkpoints."""
    file = folder / MEASURED
    old = distributed.from_primary(lambda: workdir.read_json(file) if file.exists() else {})
    if old.get("steps") == steps:
        return old
    tasks = {name: load_run(folder / name) for name, one in configs.items() if one.objective in losses.TASK_LOSSES}
    # Throughput is that of one process; several would measure how they wait for each other.
    alone = jax.process_count() == 1
    speed = throughput(tasks if alone else {}, windows=config.benchmark.windows, seconds=config.benchmark.seconds)
    measured = {"steps": dict(steps), "throughput": speed, "baseline": {}}
    distributed.on_primary(lambda: workdir.write_json(file, measured))
    return measured


def _baseline(
    folder: Path, config: Any, configs: Mapping[str, Any], measured: dict[str, Any], split: str, data: str
) -> dict[str, Any]:
    """The plain baseline on `split`, fitted once, while its examples have the fingerprint `data`."""
    key = f"{split} {data}"
    if key not in measured["baseline"]:
        print(f"baseline  {config.baseline}: fitting", flush=True)
        measured["baseline"][key] = BASELINES[config.baseline](next(iter(configs.values())), split)
        distributed.on_primary(lambda: workdir.write_json(folder / MEASURED, measured))
    return measured["baseline"][key]
