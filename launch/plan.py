"""Compiles the step of a config for TPU chips that are not there, and prints memory, communication and estimated speed.

    python -m launch.plan --config=configs/muxbert.py:base,n=5,files=.,retrieval=0 --topology=v5e:16x16
    python -m launch.plan --config=... --topology=v5p:4x4x4 --n=1,2,5,10 --mesh='data=64;data=16,fsdp=4'
    python -m launch.plan --config=... --topology=v5e:4x4 --search --json=plans.json

Needs libtpu (pip install libtpu), no accelerator; without it, parameters, their memory and operations are reckoned. For an experiment
of several runs, each is planned. Several plans are one table, in which what fails is a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from launch import cli

if TYPE_CHECKING:
    from datamux_jax.plan_search import Row
    from datamux_jax.planner import Estimate
    from datamux_jax.topology import Topology

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument after a colon.", lock_config=True
)
TOPOLOGY = flags.DEFINE_string("topology", "", "TPU topology, such as v5e:16x16, v4:4x4x8, v5p:4x4x4 or v6e:8x8.")
SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, connected through their hosts.")
STEP = flags.DEFINE_enum(
    "step", "train", ["train", "evaluate", "predict"], "Which step; evaluation and prediction put all chips along data."
)
COUNTS = flags.DEFINE_string("n", "", "Numbers of instances to compare, such as 1,2,5,10; default: the config's.")
MESHES = flags.DEFINE_string("mesh", "", "Meshes to compare, such as 'data=16,fsdp=16;data=256'; default: the config's.")
SEARCH = flags.DEFINE_bool("search", False, "Try all meshes that divide, more micro-batches where needed, and rank them.")
JSON = flags.DEFINE_string("json", "", "File to write everything to; it must not exist yet.")


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment, plan_report, plan_search, topology  # They import jax; bad flags are refused before.
    from datamux_jax.errors import InputError

    machine = topology.parse(TOPOLOGY.value, SLICES.value)
    file = Path(JSON.value) if JSON.value else None
    if file:
        plan_report.check_json(file)
    counts = plan_search.read_counts(COUNTS.value) if COUNTS.value else []
    meshes = plan_search.read_meshes(MESHES.value) if MESHES.value else []
    if STEP.value != "train" and (meshes or SEARCH.value):
        raise InputError(
            f"--step={STEP.value} puts all chips along data, so --mesh and --search have no choice. Leave them out."
        )
    if SEARCH.value and meshes:
        raise InputError("--search tries all meshes, so --mesh has no place beside it. Leave one of them out.")
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    _refuse_lost(overrides, "--search" if SEARCH.value else "--mesh" if meshes else "")
    runs = experiment.expand(CONFIG.value, overrides)
    if SEARCH.value:
        chosen = plan_search.searched(runs, counts, machine)
    else:
        chosen = plan_search.candidates(runs, counts, meshes, machine, STEP.value)
    try:
        topology.devices_of(machine)
    except topology.NoCompiler as error:
        if SEARCH.value:
            raise InputError(
                "--search ranks by what the compiler estimates, but libtpu is not installed: pip install libtpu."
            ) from error
        print(plan_report.NO_COMPILER, flush=True)
    rows: list[Row] = []
    try:
        for row in _rows(chosen, machine):
            rows.append(row)
            if file:  # As they come: a long search may be stopped.
                plan_report.write_json(file, rows, machine, STEP.value)
    except KeyboardInterrupt:
        if rows:
            print(f"\nInterrupted after {len(rows)} plans:", flush=True)
            _show(rows, machine, table=True)
        raise
    _show(rows, machine, table=len(rows) > 1)
    plan_search.check_any(rows)


def _refuse_lost(overrides: dict[str, Any], flag: str) -> None:
    """Raises InputError if the command line sets a config key that `flag` sets anew in every plan."""
    from datamux_jax.errors import InputError

    keys = [key for key in overrides if key.startswith("mesh.") or (flag == "--search" and key == "accumulation")]
    if flag and keys:
        given = ", ".join(f"--config.{key}={overrides[key]}" for key in keys)
        what = "all meshes, and numbers of micro-batches" if flag == "--search" else "the meshes that it lists"
        raise InputError(f"{flag} plans {what}, so {given} would be lost. Leave one of the two out.")


def _show(rows: list[Row], machine: Topology, table: bool) -> None:
    """Prints plans as a table, or one in full."""
    from datamux_jax import plan_report, plan_search
    from datamux_jax.errors import InputError

    print(f"{STEP.value} on {machine}; estimates, nothing is measured:", flush=True)
    if table:
        print(plan_report.comparison(plan_search.ranked(rows) if SEARCH.value else rows, machine), flush=True)
        return
    if rows[0].estimate is None:
        raise InputError(rows[0].problem)
    print(plan_report.details(rows[0], rows[0].estimate, machine), flush=True)


def _rows(chosen: Sequence[tuple[str, Any]], machine: Topology) -> Iterator[Row]:
    from datamux_jax import plan_search

    estimator = functools.partial(_estimate, machine)
    if not SEARCH.value:
        yield from plan_search.sweep(chosen, estimator)
        return
    for name, config in chosen:
        yield from plan_search.search(name, config, machine, estimator)


def _estimate(machine: Topology, config: Any) -> Estimate:
    from datamux_jax import planner

    return planner.estimate(planner.plan_for(config, machine, STEP.value), machine, STEP.value)


if __name__ == "__main__":
    cli.required("config", "topology")
    cli.run(main, goes_on=False)
