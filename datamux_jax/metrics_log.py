"""What a run writes down while it trains: lines of `metrics.jsonl`, TensorBoard events, Weights & Biases; and the progress line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamux_jax import metrics, optimizer, workdir
from datamux_jax.errors import InputError

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; one that is cut short, by a kill or because it is being written, is left out."""
    lines = []
    if (run / FILE).exists():
        for text in (run / FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


class Work(NamedTuple):
    """What one update amounts to.

    Attributes:
      positions: of all instances together.
      peak_share: share of the machine's peak that one such update in a second is; None where the peak is not known.
    """

    positions: int
    peak_share: float | None = None


class MetricsLog:
    """Adds up the sums of steps, and writes their means every `log_every` steps.

    A resumed run first drops the lines past its own start: they belong to steps that are done again.

    Args:
      run: folder of the run.
      done: steps that were done before.
      config: of the run.
      write: whether this process writes; the others only check.
      window: of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        run: Path,
        done: int,
        config: Any,
        *,
        write: bool = True,
        window: dict[str, Any] | None = None,
    ) -> None:
        self._path, self._config = run / FILE, config
        self._write = write
        self._work: list[Work] = []  # Of the updates since the clock was started.
        self._sums: metrics.Totals = {
            name: (np.array(total), np.array(weight)) for name, (total, weight) in (window or {}).items()
        }
        self._text = ""
        self._waited = 0.0
        self._clock, self._since = time.monotonic(), done
        self._rate = optimizer.schedule(config)
        self._boards: list[Any] = []
        if not write:
            return
        if self._path.exists():
            kept = (json.dumps(line) + "\n" for line in read_lines(run) if line["step"] <= done)
            workdir.write_text(self._path, "".join(kept))
        if config.tensorboard:
            self._boards.append(_TensorBoard(run / TENSORBOARD, done))
        if config.wandb:
            self._boards.append(_WeightsAndBiases(run, config))

    @property
    def window(self) -> dict[str, Any]:
        """Sums of the steps after the last line, as JSON has them: a line says the same whether a run was interrupted or not."""
        return {name: (total.tolist(), weight.tolist()) for name, (total, weight) in self._sums.items()}

    def restart_clock(self, done: int) -> None:
        """Forgets the time up to step `done`: compilation says nothing about the rate."""
        self._clock, self._since, self._waited, self._work = time.monotonic(), done, 0.0, []

    def paused(self, seconds: float) -> None:
        """Leaves time out that was not spent on training."""
        self._clock += seconds

    def waited(self, seconds: float) -> None:
        """Adds time that the step stood still for data."""
        self._waited += seconds

    def check(self, sums: Any, done: int) -> None:
        """Raises InputError, naming step and term, if a sum is not finite."""
        for name, (total, _) in sums.items():
            if not np.isfinite(total).all():
                raise InputError(
                    f"{name} is not finite at step {done}: training has diverged. The last checkpoint before is good. Lower "
                    "optimizer.learning_rate, lengthen optimizer.warmup_steps or set optimizer.grad_clip, and start again in a new "
                    "--workdir."
                )

    def add(self, done: int, sums: Any, work: Work) -> str:
        """Takes the sums of step `done`, and what it amounted to; returns the numbers for the progress line."""
        self.check(sums, done)
        if done > self._since:
            self._work.append(work)
        self._sums = metrics.merge([self._sums, sums])
        if done % self._config.log_every == 0 or done == self._config.steps:
            now = time.monotonic()
            means = metrics.means(self._sums)
            seconds = max(now - self._clock, 1e-9)
            updates = done - self._since
            instances = updates * self._config.batch_groups * self._config.num_instances / seconds
            line = {**means, "learning_rate": float(self._rate(done - 1))}
            if updates:  # None if the clock was started again at this very step.
                line |= {
                    "instances_per_second": instances,
                    "tokens_per_second": sum(one.positions for one in self._work) / seconds,
                    "data_wait_share": min(self._waited / seconds, 1.0),
                }
            if updates and work.peak_share is not None:
                line["mfu"] = sum(one.peak_share or 0.0 for one in self._work) / seconds
            self.write(done, line)
            self._sums, self._clock, self._since, self._waited, self._work = {}, now, done, 0.0, []
            self._text = _summary(means, instances)
        return self._text

    def write(self, done: int, line: Mapping[str, Any]) -> None:
        """Writes numbers that belong to step `done`."""
        if not self._write:
            return
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": done, **line}) + "\n")
        for board in self._boards:
            board.write(done, _scalars(line))

    def close(self) -> None:
        for board in self._boards:
            board.close()


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from tensorboardX import SummaryWriter  # Writes event files without TensorFlow.

        # Events past the start belong to steps that are done again.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1, flush_secs=30)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: Path, config: Any) -> None:
        import wandb

        # One identity a folder: what is resumed there is resumed on the board.
        identity = "-".join(run.absolute().parts[-3:]).replace("/", "-")[-128:]
        self._run = wandb.init(
            project=config.wandb, id=identity, name=run.name, resume="allow", dir=str(run), config=workdir.plain(config)
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def check_boards(config: Any) -> None:
    """Raises InputError if what should be written to is not installed."""
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"wandb = {config.wandb!r} logs to Weights & Biases, which is not installed. pip install 'datamux_jax[wandb]', or "
                "leave wandb empty."
            ) from error


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line, those of slots under names of their own: `accuracy_per_slot/3`."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        pairs = [(f"{name}/{slot}", one) for slot, one in enumerate(value)] if isinstance(value, list) else [(name, value)]
        flat |= {key: float(one) for key, one in pairs if one is not None}
    return flat


def _summary(means: dict[str, Any], rate: float) -> str:
    shown = [f"loss {means['loss']:.3f}"]
    names = {"accuracy": "accuracy", "mlm_accuracy": "mlm", "replaced_accuracy": "replaced", "retrieval_accuracy": "retrieval"}
    for name, short in names.items():
        if means.get(name) is not None:
            shown.append(f"{short} {means[name]:.1%}")
    if means.get("state_loss") is not None:
        shown.append(f"states {1 - means['state_loss']:.3f}")
    return "  ".join([*shown, f"{rate:,.0f} instances/s"])
