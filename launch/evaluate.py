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
GROUPINGS = flags.DEFINE_integer("eval_groupings", 0, "Random groupings; default: the config's eval.groupings.", lower_bound=0)
flags.DEFINE_alias("groupings", "eval_groupings")
PREDICTIONS = flags.DEFINE_string(
    "predictions", "", "File for the predictions of one run, which must not exist yet: .tsv or .jsonl, a row an example."
)


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment  # Imports jax; bad flags are refused before.

    predictions = Path(PREDICTIONS.value) if PREDICTIONS.value else None
    experiment.compare(Path(WORKDIR.value), split=SPLIT.value, groupings=GROUPINGS.value, predictions=predictions)


if __name__ == "__main__":
    cli.required("workdir")
    cli.run(main)
