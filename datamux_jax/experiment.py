"""An experiment: several runs of one config, each trained and evaluated in its own folder, compared in one report.

A run may start from an earlier one (`init_from = "../n2-warmup"`), so stages and sweeps are written the same way. Everything
that is finished stays finished: the same command after an interruption goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from datamux_jax import report, workdir
from datamux_jax.baselines import BASELINES
from datamux_jax.benchmark import throughput
from datamux_jax.config import validate
from datamux_jax.errors import InputError, choose
from datamux_jax.evaluate import evaluate_run
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
    runs = {}
    for name in config.runs:
        run = config.copy_and_resolve_references()
        with run.unlocked():
            run.runs, run.overrides = (), ml_collections.ConfigDict()
        run.lock()
        override = config.overrides.get(name, {})
        changes = workdir.flatten(override.to_dict() if override else {})
        for key, value in changes.items():
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


def run(config: ml_collections.ConfigDict, folder: str | Path, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains and evaluates all runs of `config` below `folder`, measures throughput, writes and prints the report.

    Args:
      config: complete config.
      folder: the workdir; for an experiment, each run's folder lies below.
      flags: dotted config keys given on the command line.

    Returns:
      The report's contents.

    Raises:
      InputError: bad input; nothing has been written then.
      Interrupted: a signal came; the state is saved.
    """
    folder = Path(folder)
    runs = expand(config, flags)
    for one in runs.values():
        validate(one)
    if config.baseline:
        choose(BASELINES, config.baseline, "The config value baseline =")
    if config.runs:
        workdir.claim(folder, config, needed_bytes=20_000_000)
    for name, one in runs.items():
        train(one, folder / name, label=name or "train")
        evaluate_run(folder / name, label=f"{name} evaluate".strip())
    return compare(folder)


def compare(folder: Path, *, split: str = "", groupings: int = 0, again: bool = False) -> dict[str, Any]:
    """Evaluates all runs of the experiment (or the single run) in `folder`, measures what is missing, writes the report.

    Args:
      folder: the workdir.
      split: to evaluate on; default: the config's.
      groupings: of the evaluation; default: the config's.
      again: measure throughput again, also where it is on disk.
    """
    config = workdir.load_config(folder)
    names = list(config.runs) or [""]
    scores = {
        name: evaluate_run(folder / name, split=split, groupings=groupings, label=f"{name} evaluate".strip()) for name in names
    }
    loaded = {name: load_run(folder / name) for name in names}
    classifiers = {name: run for name, run in loaded.items() if run.config.objective == "classification"}
    steps = {name: run.step for name, run in loaded.items()}
    saved = folder / MEASURED
    measured = workdir.read_json(saved) if saved.exists() and not again else {}
    if measured.get("steps") != steps:
        measured = {
            "steps": steps,
            "throughput": throughput(classifiers, windows=config.benchmark.windows, seconds=config.benchmark.seconds),
        }
        if config.baseline:
            print(f"baseline  {config.baseline}: fitting", flush=True)
            measured["baseline"] = BASELINES[config.baseline](next(iter(loaded.values())).config)
        workdir.write_json(saved, measured)
    return report.write(folder, config, scores, measured, {name: run.config for name, run in loaded.items()})
