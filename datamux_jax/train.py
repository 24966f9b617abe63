"""The trainer: one loop, from wherever a run stands. Warm-up, pre-training and fine-tuning differ in objective and config only."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from datamux_jax import checkpoint, distill, distributed, metrics, predicted, saved, scoring, sharding, start, workdir
from datamux_jax.data import pipeline
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError, Interrupted
from datamux_jax.metrics_log import MetricsLog, Work
from datamux_jax.plan import Plan, prepare
from datamux_jax.progress import Progress
from datamux_jax.step import CompiledStep, born_sharded

PROFILE = "profile"


def train(config: Any, run: Path, *, label: str = "train", profile: tuple[int, int] | None = None) -> None:
    """Trains the run that `config` describes in the folder `run`, from wherever it stands; returns at once if it is done.

    Start precedence: the folder's own checkpoint, then `config.resume`, then `config.init_from`, then scratch.

    Args:
      config: complete config.
      run: its folder.
      label: of the progress line.
      profile: first and last step of a profiler trace, written to the folder `profile`.

    Raises:
      InputError: the config, the data, the folder or the run to start from is wrong; nothing has been written then.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    distributed.check_same({"the config": repr(workdir.plain(config))})
    plan = distributed.primary_first(lambda: prepare(config, run))
    distributed.check_same({"the data": plan.fingerprint})
    done = distributed.from_primary(lambda: saved.newest_step(run))
    if done is None:
        distributed.on_primary(lambda: start.check(plan, run))
        distributed.on_primary(lambda: start.check_teacher(plan, run))
        distributed.on_primary(lambda: distill.check(plan, run))
    with contextlib.ExitStack() as stack:
        distributed.on_primary(lambda: stack.enter_context(_claimed(plan, run, done)))
        saves = checkpoint.Checkpoints(run, config)
        stack.enter_context(contextlib.closing(saves))
        # A finished run is read, so that a last checkpoint which is damaged is made again.
        if done == config.steps:
            if saves.newest_intact(plan.abstract.params) == done:
                return
            distributed.on_primary(lambda: start.check_data(plan, run))
        if unsplit := sharding.not_split(plan.boxed.params, plan.mesh):
            print(f"Whole on every device, as sizes do not divide over the mesh: {'; '.join(unsplit)}", flush=True)
        _Loop(plan, run, saves, profile, begun=done is not None).run(label)


@contextlib.contextmanager
def _claimed(plan: Plan, run: Path, done: int | None) -> Iterator[None]:
    """Holds the folder for the run of `plan`, of which it has a checkpoint of step `done`, or none."""

    def check() -> None:
        if plan.format.saved_in(run) and Format.load(run) != plan.format:
            raise InputError(
                f"--workdir={run} was trained on data that are encoded differently from those that its config names now: the files, "
                "the tokenizer or a package that ships data have changed. Restore them, or choose another --workdir; nothing was "
                "changed."
            )
        if done not in (None, plan.config.steps):
            start.check_data(plan, run)

    needed_bytes = 0 if done == plan.config.steps else plan.missing_bytes(run)
    with workdir.claimed(run, plan.config, needed_bytes, check):
        if not plan.format.saved_in(run):
            plan.format.save(run)
        yield


class _Loop:
    """One run, from the state that it starts from to its last step."""

    def __init__(
        self, plan: Plan, run: Path, saves: checkpoint.Checkpoints, profile: tuple[int, int] | None, *, begun: bool
    ) -> None:
        config = plan.config
        self._plan, self._config, self._run, self._saves, self._profile = plan, config, run, saves, profile
        # Before the state comes into being: the teacher needs memory of its own.
        taught = distill.teacher_arrays(plan, run)
        self._state, host = start.initial_state(
            plan, run, saves, lambda: born_sharded(plan.make, config.seed, plan.mesh), begun=begun
        )
        self._data = pipeline.train_iterator(
            plan.arrays | taught,
            groups=config.batch_groups,
            instances=config.num_instances,
            seed=config.seed,
            mine=sharding.local_groups(plan.mesh, config.batch_groups),
            buckets=plan.buckets,
        )
        if host is not None:
            self._data.set_state(host["position"])
        self._done = int(self._state.step)
        # What was resumed from elsewhere is saved here, even if nothing is left to do.
        self._saved = -1 if host is not None and not begun else self._done
        self._log = MetricsLog(
            run,
            self._done,
            config,
            write=distributed.is_primary(),
            window=host and host["window"],
        )
        self._step: CompiledStep | None = None
        self._work: dict[int, Work] = {}  # By length of rows.
        self._tracing = False
        self._scoring = scoring.scoring_step(config, plan.model, plan.second)

    def run(self, label: str) -> None:
        """Trains to the end, or until a signal comes.

        Raises:
          InputError: training has diverged, or the disk is full.
          Interrupted: a signal came; the state is saved.
        """
        config = self._config
        if self._done:
            print(f"{label}: goes on from step {self._done} of {config.steps}", flush=True)
        progress = Progress(label, config.steps, self._done)
        with stop_signals() as stop, contextlib.closing(progress), contextlib.closing(self._log):
            pending = None
            while self._done < config.steps and not distributed.reached_stop(stop()):
                first = self._step is None
                now = self._update()
                if pending is not None:
                    # One step late: the device already works on the next step while these numbers travel.
                    progress.update(self._done - 1, self._add(self._done - 1, *pending))
                if first and self._done < config.steps:
                    jax.block_until_ready(now)  # The first step compiles; the clocks start after it.
                    progress.restart_clock(self._done)
                    self._log.restart_clock(self._done)
                pending = now
                if self._due(config.eval.every) or (self._done < config.steps and self._due(config.checkpoint.every)):
                    # A line belongs on the disk before the checkpoint that it leads to; and what diverged is not saved.
                    progress.update(self._done, self._add(self._done, *pending))
                    pending = None
                    self._save()
            self._end_trace()
            if pending is not None:
                progress.update(self._done, self._add(self._done, *pending))
            if self._done > self._saved:
                self._save()
            self._saves.wait()
            # Several processes are stopped where all agree: at the next call of `distributed.stop_if_asked`.
            stopped = stop() and jax.process_count() == 1
        if self._done < config.steps or stopped:
            raise Interrupted(
                f"Stopped at step {self._done} of {config.steps}; the state is saved. The same command goes on from there."
            )

    def _add(self, done: int, sums: Any, work: Work) -> str:
        return self._log.add(done, jax.device_get(sums), work)

    def _update(self) -> tuple[Any, Work]:
        """Does one step; returns its sums, which may not be there yet, and what it amounts to."""
        plan = self._plan
        asked = time.monotonic()
        rows = next(self._data)
        self._log.waited(time.monotonic() - asked)
        batch = sharding.put_batch(rows, plan.mesh, self._config.batch_groups)
        if self._step is None:
            # All of them now: the largest may not fit, and none is to hold up the training later.
            batches = (plan.shapes_of(self._config.batch_groups, length) for length in plan.lengths)
            self._step = CompiledStep(plan.jitted_step(), self._state, *batches)
            self._work = {length: plan.work(length) for length in plan.lengths}
        self._trace(starting=True)
        self._state, sums = self._step(self._state, batch)
        self._done += 1
        self._trace(starting=False)
        return sums, self._work[rows["mask"].shape[-1]]

    def _trace(self, starting: bool) -> None:
        """Starts the profiler's trace before the first step asked for, and ends it after the last one."""
        first, last = self._profile or (1, 0)
        if starting and not self._tracing and first <= self._done + 1 <= last:
            jax.profiler.start_trace(str(self._run / PROFILE))
            self._tracing = True
        elif not starting and self._tracing and self._done >= min(last, self._config.steps):
            self._end_trace()

    def _end_trace(self) -> None:
        if self._tracing:
            jax.block_until_ready(self._state)
            jax.profiler.stop_trace()
            self._tracing = False

    def _due(self, every: int) -> bool:
        return bool(every) and (self._done % every == 0 or self._done == self._config.steps)

    def _save(self) -> None:
        scores = self._scores() if self._due(self._config.eval.every) else None
        state = self._state
        best = self._config.checkpoint.best
        if scores is not None and self._config.checkpoint.keep_best and best not in scores:
            raise InputError(
                f"The evaluation at step {self._done} has no {best}, which checkpoint.best names: none of its examples has a label for "
                "it. Name another metric, or another eval.split."
            )
        host = {"position": self._data.get_state(), "window": self._log.window, "data": self._plan.fingerprint}
        self._saves.save(self._done, state.params, start.rest(state), host, scores)
        self._saved = self._done

    def _scores(self) -> dict[str, float]:
        """Evaluates, and logs what came out; one grouping, the same every time."""
        plan, config = self._plan, self._config
        began = time.monotonic()
        scored = scoring.score(self._scoring, self._state.params, plan.examples, config, plan.mesh, seed=0)
        scores = metrics.means(scored.totals) | predicted.numbers(scored, plan.examples, plan.format, config.num_instances)
        self._log.write(self._done, {f"eval_{name}": value for name, value in scores.items()})
        self._log.paused(time.monotonic() - began)
        shown = {name: value for name, value in scores.items() if isinstance(value, float)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        print(f"\nevaluation at step {self._done}: {text}", flush=True)
        return shown


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While active, SIGINT and SIGTERM ask for a stop instead of causing one; a second SIGINT does what it always did.

    Outside the main thread (notebook workers, tests) signals are left alone. Among several processes SIGTERM is left to JAX, which
    tells all of them; SIGINT is passed on as SIGTERM.
    """
    received: list[int] = []
    old: dict[int, Any] = {}

    def handler(old: dict[int, Any], number: int, frame: Any) -> None:
        received.append(number)
        if several and len(received) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # Of SIGTERM the old handler, that of `launch.train`, would break off the save that the first one asked for.
        if len(received) > 1 and number == signal.SIGINT and callable(old[number]):
            old[number](number, frame)

    several = jax.process_count() > 1
    for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, functools.partial(handler, old))
    try:
        yield lambda: bool(received)
    finally:
        for restored, previous in old.items():
            signal.signal(restored, previous)
