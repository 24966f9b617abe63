"""Looks inside a run: layers, interference between instances, retrieval by position, and pictures of its states.

python -m launch.analyze --workdir=runs/quickstart/n8
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a run.")
AGAINST = flags.DEFINE_string(
    "against", "", "Folder of an N = 1 run to compare layers with; default: the one in the same experiment."
)
OUTPUT = flags.DEFINE_string("output", "", "Folder to write to; default: that of the run.")
SPLIT = flags.DEFINE_string("split", "", "Split to look at; default: the config's eval.split.")
EXAMPLES = flags.DEFINE_integer("examples", 256, "Examples of the split, the first ones; 0: all.", lower_bound=0)
GROUPINGS = flags.DEFINE_integer("groupings", 1, "Random groupings, for layers and retrieval.", lower_bound=1)
COMPANIONS = flags.DEFINE_integer(
    "companions", 10, "Random sets of companions of each example in each slot, for interference.", lower_bound=2
)


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import analysis  # Imports jax; bad flags are refused before.

    analysis.analyze(
        WORKDIR.value,
        against=AGAINST.value or None,
        output=OUTPUT.value or None,
        split=SPLIT.value,
        examples=EXAMPLES.value,
        groupings=GROUPINGS.value,
        companions=COMPANIONS.value,
    )


if __name__ == "__main__":
    cli.required("workdir")
    cli.run(main, goes_on=False)
