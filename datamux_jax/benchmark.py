"""Throughput: device only, after warm-up, windows interleaved between the contenders, medians. All that is timed is timed here."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from datamux_jax.data import pipeline
from datamux_jax.predict import Predictor
from datamux_jax.progress import Progress
from datamux_jax.runs import Run

MOST_TRIALS = 10  # Calls that say how long one takes; fewer where they would fill more than a window.


def throughput(runs: Mapping[str, Run], *, windows: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Measures prediction at equal groups: every run handles `eval.batch_groups` mixed rows a call.

    Inputs lie on the device, results stay there; compilation and the first calls are left out. A window is as many calls as fill
    `seconds`. Windows of all runs alternate, so that what else the machine does hits all alike.

    Args:
      runs: name -> loaded run; the first one is the reference of the ratios.
      windows: timed windows a run.
      seconds: length of a window.

    Returns:
      For each run `instances_per_second` (median), `spread` (interquartile range over median), `ratio` (median over windows of
      the ratio to the first run's window), `instances_per_call` and `windows`, the instances a second of each.
    """
    calls: dict[str, Callable[[], Any]] = {}
    instances: dict[str, int] = {}
    for name, run in runs.items():
        predictor = Predictor(run)
        _, splits = pipeline.load(run.config)
        _, batch = next(predictor.batches(splits[run.config.eval.split], shuffle=True))
        compiled = predictor.forward.lower(run.params, batch).compile()
        calls[name] = functools.partial(compiled, run.params, batch)
        instances[name] = predictor.batch_size
    return measure(calls, instances, windows=windows, seconds=seconds) if calls else {}


def measure(
    calls: Mapping[str, Callable[[], Any]],
    instances: Mapping[str, int],
    *,
    windows: int,
    seconds: float,
    reference: Mapping[str, str] | None = None,
    after: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Times functions that return device arrays, in interleaved windows; arguments and result as in `throughput`.

    The calls of a window follow each other without waiting; the window ends when the last result is there.

    Args:
      calls: name -> function without arguments.
      instances: name -> instances that one call handles.
      windows: timed windows a function.
      seconds: length of a window, which has at least one call.
      reference: name -> the function that its ratio is to; default: the first one, for all.
      after: is given the result so far after each round of windows.
    """
    repeats = {name: _repeats(call, seconds) for name, call in calls.items()}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    first = next(iter(calls))
    progress = Progress("throughput", windows)
    result: dict[str, dict[str, Any]] = {}
    for window in range(windows):
        for name, call in calls.items():
            rates[name].append(instances[name] * repeats[name] / _timed(call, repeats[name]))
        result = {
            name: {
                **summary(values, rates[reference[name] if reference else first]),
                "instances_per_call": instances[name],
                "windows": list(values),
            }
            for name, values in rates.items()
        }
        if after:
            after(result)
        progress.update(window + 1)
    progress.close()
    return result


def summary(rates: list[float], reference: list[float]) -> dict[str, float]:
    """Median and spread of the windows of one function, and the ratio to those of another, window by window."""
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return {
        "instances_per_second": float(middle),
        "spread": float((high - low) / middle),
        "ratio": float(np.median(np.array(rates) / reference)),
    }


def _repeats(call: Callable[[], Any], seconds: float) -> int:
    """How many calls fill a window."""
    _timed(call, 1)
    once = _timed(call, 1)
    if once >= seconds:
        return 1
    trials = min(MOST_TRIALS, math.ceil(seconds / max(once, 1e-9)))
    return max(1, round(seconds / (_timed(call, trials) / trials)))


def _timed(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return time.perf_counter() - start
