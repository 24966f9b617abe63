"""Compiles the training step of a config for TPU chips that are not there, and prints memory, communication and estimated speed.

python -m launch.plan --config=configs/muxbert.py:base,n=5,files=. --topology=v5e:16x16

Needs libtpu (pip install libtpu), no accelerator. For an experiment of several runs, each is planned.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from launch import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument after a colon.", lock_config=True
)
TOPOLOGY = flags.DEFINE_string("topology", "", "TPU topology, such as v5e:16x16, v4:4x4x8, v5p:4x4x4 or v6e:8x8.")


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import experiment, planner  # They import jax; bad flags are refused before.

    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    devices = planner.topology_devices(TOPOLOGY.value)
    for name, config in experiment.expand(CONFIG.value, overrides).items():
        plan = planner.plan_for(config, devices)
        print(f"{name or 'run'} on {TOPOLOGY.value}, by the compiler's estimate:", flush=True)
        print(planner.table(plan, planner.estimate(plan, TOPOLOGY.value)), flush=True)


if __name__ == "__main__":
    cli.required("config", "topology")
    cli.run(main)
