"""Evaluates a run, or every run of an experiment, on all examples of a split.

    python -m launch.evaluate --workdir=runs/quickstart
    python -m launch.evaluate --workdir=runs/quickstart --ensemble=4

With --ensemble every example is fed so many times, in other slots and groups, and its outputs are averaged: accuracy for
throughput, of the runs whose N it divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a run, or of an experiment.")
SPLIT = flags.DEFINE_string("split", "", "Split to score; default: the config's eval.split.")
GROUPINGS = flags.DEFINE_integer("eval_groupings", 0, "Random groupings; default: the config's eval.groupings.", lower_bound=0)
flags.DEFINE_alias("groupings", "eval_groupings")
PREDICTIONS = flags.DEFINE_string(
    "predictions",
    "",
    "File for the predictions of one run, which must not exist yet: .tsv or .jsonl, rows numbered from 1 "
    "in the order of the split.",
)
ENSEMBLE = flags.DEFINE_integer("ensemble", 1, "Times that every example is fed, outputs averaged; divides N.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment  # Imports jax; bad flags are refused before.

    predictions = Path(PREDICTIONS.value) if PREDICTIONS.value else None
    how: Any = {"split": SPLIT.value, "groupings": GROUPINGS.value, "predictions": predictions}
    if ENSEMBLE.value > 1:
        experiment.ensembles(Path(WORKDIR.value), ENSEMBLE.value, **how)
    else:
        experiment.compare(Path(WORKDIR.value), **how)


if __name__ == "__main__":
    cli.required("workdir")
    cli.run(main)
