"""Evaluates a run, or every run of an experiment, on all examples of a split.

python -m launch.evaluate --workdir=runs/quickstart
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a run, or of an experiment.")
SPLIT = flags.DEFINE_string("split", "", "Split to score; default: the config's eval.split.")
GROUPINGS = flags.DEFINE_integer("groupings", 0, "Random groupings; default: the config's eval.groupings.", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment  # Imports jax; bad flags are refused before.

    experiment.compare(Path(WORKDIR.value), split=SPLIT.value, groupings=GROUPINGS.value)


if __name__ == "__main__":
    cli.required("workdir")
    cli.run(main)
