"""Throughput against N, beside what a user would pick instead: prediction or training step.

    python -m launch.benchmark --config=configs/benchmark.py:bert_base,n=1+2+5+10 --output=runs/speed \\
        --contenders=narrow:1+5,shallow:1+5,torch,torch-bf16,onnx,onnx-int8
    python -m launch.benchmark --config=configs/benchmark.py:bert_base,n=1+5 --step=train --output=runs/speed-train
    python -m launch.benchmark --workdir=runs/text --results=runs/text/report.json --output=runs/speed-text

Any config will do, with random weights (running text is not read; other data say their labels), or a trained run or experiment.
Writes benchmark.md, benchmark.json (every window, as it comes) and benchmark.png. docs/benchmark.md says how it is measured.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from datamux_jax.errors import InputError
from launch import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional argument after a colon.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "", "Instead of --config: folder of a trained run, or of an experiment.")
OUTPUT = flags.DEFINE_string("output", "", "Folder for the results; it must hold none yet.")
STEP = flags.DEFINE_string("step", "predict", "What is timed: predict or train.")
CONTENDERS = flags.DEFINE_list(
    "contenders", [], "Beside it: plain, narrow, shallow (also narrow:1+2+5), torch, torch-bf16, onnx, onnx-int8."
)
BALANCE = flags.DEFINE_list("balance", ["groups", "instances"], "Equal groups, equal instances a batch, or both.")
SCOPE = flags.DEFINE_list("scope", ["device"], "device, end_to_end (from raw inputs to fetched results), or both.")
INSTANCES = flags.DEFINE_integer("instances", 0, "Of a batch at equal instances; default: the smallest that every N divides.")
BATCHES = flags.DEFINE_integer("batches", 0, "Batches a call, end to end; default: 2.")
WINDOWS = flags.DEFINE_integer("windows", 0, "Timed windows a row; default: the config's benchmark.windows.", lower_bound=0)
SECONDS = flags.DEFINE_float("seconds", 0.0, "Length of a window; default: the config's benchmark.seconds.", lower_bound=0)
MEMORY = flags.DEFINE_string("memory", "program", "program: by the compiler; process: peak of a process for each row of ours.")
BREAKDOWN = flags.DEFINE_bool(
    "breakdown", False, "Time the stages too: embedding with mixing, backbone, demultiplexing with the head."
)
PROFILE = flags.DEFINE_string("profile", "", "Folder for a jax.profiler trace, written after the measurement.")
RESULTS = flags.DEFINE_list("results", [], "metrics.json of runs, or report.json of an experiment: accuracy against N.")


def main(argv: Sequence[str]) -> None:
    del argv
    if (CONFIG.value is None) == (not WORKDIR.value):
        raise InputError("Say what to measure: either --config=FILE, with random weights, or --workdir=DIR of trained runs.")
    import jax  # Bad flags are refused before.

    from datamux_jax import benchmark_report, benchmark_run, contenders, experiment, workdir

    jax.config.update("jax_enable_compilation_cache", False)  # Compiling is measured too.
    folder = Path(WORKDIR.value) if WORKDIR.value else None
    if folder is None:
        config = CONFIG.value
        configs = experiment.expand(config, config_flags.get_override_values(flags.FLAGS["config"]))
    else:
        config = workdir.load_config(folder)
        configs = {name: workdir.load_config(folder / name) for name in config.runs or ("",)}
    entries = benchmark_run.own_entries(configs, STEP.value, folder)
    settings = benchmark_run.Settings(
        step=STEP.value,
        balances=tuple(BALANCE.value),
        scopes=tuple(SCOPE.value),
        instances=INSTANCES.value,
        batches=BATCHES.value,
        windows=WINDOWS.value or config.benchmark.windows,
        seconds=SECONDS.value or config.benchmark.seconds,
        memory=MEMORY.value,
        breakdown=BREAKDOWN.value,
        profile=Path(PROFILE.value) if PROFILE.value else None,
    )
    output = Path(OUTPUT.value)
    results = benchmark_report.read_results(RESULTS.value)
    entries += contenders.entries(CONTENDERS.value, entries[-1].config, STEP.value)
    command = shlex.join(["python", "-m", "launch.benchmark", *sys.argv[1:]])
    about = {"title": config.title or "Throughput", "command": command, "results": results}
    benchmark_run.run(entries, settings, output, about)


if __name__ == "__main__":
    cli.required("output")
    cli.run(main, goes_on=False)
