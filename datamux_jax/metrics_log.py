"""The lines of `metrics.jsonl`, and the numbers of the progress line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax import metrics, optimizer, workdir
from datamux_jax.errors import InputError


class MetricsLog:
    """Adds up the sums of steps, and appends their means to a JSONL file every `log_every` steps.

    A resumed run first drops the lines past its own start: they belong to steps that are done again.
    """

    def __init__(self, path: Path, done: int, config: Any) -> None:
        self._path, self._config = path, config
        self._parts: list[Any] = []
        self._text = ""
        self._clock, self._since = time.monotonic(), done
        self._rate = optimizer.schedule(config)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            workdir.write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= done))

    def restart_clock(self, done: int) -> None:
        """Forgets the time up to step `done`: compilation says nothing about the rate."""
        self._clock, self._since = time.monotonic(), done

    def check(self, sums: Any, done: int) -> None:
        """Raises InputError, naming step and term, if a sum is not finite."""
        for name, (total, _) in sums.items():
            if not np.isfinite(total).all():
                raise InputError(
                    f"{name} is not finite at step {done}: training has diverged. The last checkpoint before is good. Lower "
                    "optimizer.learning_rate, lengthen optimizer.warmup_steps or set optimizer.grad_clip, and start again in a new "
                    "--workdir."
                )

    def add(self, done: int, sums: Any) -> str:
        """Takes the sums of step `done`; returns the numbers for the progress line."""
        self.check(sums, done)
        self._parts.append(sums)
        if done % self._config.log_every == 0 or done == self._config.steps:
            now = time.monotonic()
            means = metrics.means(metrics.merge(self._parts))
            seconds = max(now - self._clock, 1e-9)
            instances = (done - self._since) * self._config.batch_groups * self._config.num_instances
            line = {
                "step": done,
                **means,
                "learning_rate": float(self._rate(done - 1)),
                "instances_per_second": instances / seconds,
            }
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            self._parts, self._clock, self._since = [], now, done
            self._text = _summary(means, line["instances_per_second"])
        return self._text


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # A line cut short by a kill.


def _summary(means: dict[str, Any], rate: float) -> str:
    shown = [f"loss {means['loss']:.3f}"]
    for name, short in (("accuracy", "accuracy"), ("retrieval_accuracy", "retrieval")):
        if means.get(name) is not None:
            shown.append(f"{short} {means[name]:.1%}")
    return "  ".join([*shown, f"{rate:,.0f} instances/s"])
