"""Trains what a config describes, evaluates it, and writes a report. The same command again goes on where it was.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from launch import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument after a colon.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, metrics, report.")


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment  # Imports jax; bad flags are refused before.

    experiment.run(CONFIG.value, WORKDIR.value, config_flags.get_override_values(flags.FLAGS["config"]))


if __name__ == "__main__":
    cli.required("config", "workdir")
    cli.run(main)
