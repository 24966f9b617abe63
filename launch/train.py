"""Trains what a config describes, evaluates it, and writes a report. The same command again goes on where it was.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

On several hosts the same command runs on every one of them, with --multihost (docs/pods.md).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from launch import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument after a colon.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, metrics, report.")
PROFILE = flags.DEFINE_string("profile_steps", "", "First and last step of a profiler trace of every run, A:B.")
MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "One of several processes that find each other (Cloud TPU, GKE, Slurm, Open MPI)."
)
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where the environment does not say it.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", -1, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which one this is, from 0.")


def main(argv: Sequence[str]) -> None:
    del argv
    import jax  # Bad flags are refused before.

    from datamux_jax import distributed, experiment

    distributed.initialize(
        multihost=MULTIHOST.value,
        coordinator=COORDINATOR.value,
        num_processes=NUM_PROCESSES.value,
        process_id=PROCESS_ID.value,
    )
    if jax.process_count() == 1:  # Of several, JAX takes the signal. Evaluation and report end as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not distributed.is_primary():
        # One process reports progress; errors of all are shown.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 It stays open to the end.
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    experiment.run(CONFIG.value, WORKDIR.value, overrides, steps_of(PROFILE.value))


def steps_of(text: str) -> tuple[int, int] | None:
    """Reads `A:B`; None for nothing."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    return (first, last) if 0 < first <= last else None


if __name__ == "__main__":
    cli.required("config", "workdir")
    flags.register_validator(
        "profile_steps", lambda text: not text or steps_of(text) is not None, "--profile_steps is A:B with 0 < A <= B"
    )
    cli.run(main)
