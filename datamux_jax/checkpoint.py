"""Checkpoints of a run (orbax): written asynchronously, kept by age and by score, verified when they are read."""

from __future__ import annotations

import contextlib
import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from datamux_jax import distributed
from datamux_jax.errors import InputError
from datamux_jax.progress import quiet

FOLDER = "checkpoints"
DAMAGED = ".damaged"
LOWER_IS_BETTER = ("loss", "error")
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints below `run`: parameters, the rest of the state, and the data position together, written asynchronously.

    A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones good. Each holds
    a checksum of every array. What cannot be read, or reads as something else than was written, is reported, and the checkpoint
    before it takes its place.

    Args:
      run: folder of the run.
      keep: newest checkpoints that stay.
      keep_best: best checkpoints that stay besides.
      best: metric that says which is best; needed with `keep_best`.
      read_only: for reading alone, also while another process writes.
    """

    def __init__(self, run: Path, keep: int = 1, keep_best: int = 0, best: str = "", *, read_only: bool = False) -> None:
        self._run, self._folder, self._read_only = run, (run / FOLDER).absolute(), read_only
        self._track_best = keep_best > 0
        lower = best.endswith(LOWER_IS_BETTER)

        def score(metrics: dict[str, float]) -> float:
            return -metrics[best] if lower else metrics[best]

        options: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
        if not read_only:
            policies: list[Any] = [preservation_policy.LatestN(keep)]
            if keep_best:
                policies.append(
                    preservation_policy.BestN(n=keep_best, get_metric_fn=score, keep_checkpoints_without_metrics=False)
                )
            policy = preservation_policy.AnyPreservationPolicy(policies)
            options = {"preservation_policy": policy, "create": True, "cleanup_tmp_directories": True}
        if self._track_best:
            options |= {"best_fn": score, "best_mode": "max"}
        with quiet():
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(**options),
                # Named here, an item's metadata can be read without restoring it.
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "rest": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def chosen_step(self) -> int | None:
        """The step to use: the best one if scores are kept, otherwise the newest."""
        if self._track_best and (best := self._manager.best_step()) is not None:
            return best
        return self.latest_step

    def save(
        self, step: int, params: Any, rest: Any = None, position: Any = None, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to save; returns as soon as the state is copied. Parameters alone make a run to start from, not to resume.

        Args:
          step: the number of updates so far.
          params: parameters.
          rest: rest of the state.
          position: of the data iterator, as JSON has it.
          metrics: of an evaluation at this step.

        Raises:
          InputError: the disk is full. The checkpoints before stay good.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params)}
        if rest is not None:
            items["rest"] = ocp.args.StandardSave(rest)
        about = {"checksums": checksums({"params": params, "rest": rest}), "position": position}
        items["run"] = ocp.args.JsonSave(about)
        with _explain_full_disk(self._folder), quiet():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, params: Any, rest: Any) -> tuple[int, Any, Any, Any]:
        """Restores the newest intact checkpoint; damaged ones after it are moved aside.

        Args:
          params: abstract parameters with shardings.
          rest: abstract rest of the state with shardings.

        Returns:
          Its step, parameters, rest of the state, and data position.

        Raises:
          InputError: none is intact.
        """

        def read(step: int) -> tuple[int, Any, Any, Any]:
            items = ocp.args.Composite(
                params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest), run=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=items)
            return step, restored["params"], restored["rest"], restored["run"]

        def check(found: tuple[int, Any, Any, Any]) -> None:
            verify({"params": found[1], "rest": found[2]}, found[3]["checksums"])

        step, params, rest, run = self._first_intact(read, self.latest_step, check)
        return step, params, rest, run["position"]

    def restore_params(self, params: Any) -> tuple[int, Any]:
        """Restores the parameters of the chosen checkpoint alone, and says which step it is.

        Raises:
          InputError: none is intact.
        """

        def read(step: int) -> tuple[int, Any, Any]:
            items = ocp.args.Composite(params=ocp.args.StandardRestore(params), run=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
            return step, restored["params"], restored["run"]

        def check(found: tuple[int, Any, Any]) -> None:
            verify({"params": found[1]}, found[2]["checksums"])

        return self._first_intact(read, self.chosen_step, check)[:2]

    def params_metadata(self) -> Any:
        """Shapes and types of the chosen checkpoint's parameters, as a tree."""
        return self._first_intact(lambda step: self._manager.item_metadata(step)["params"].tree, self.chosen_step)

    def items(self) -> set[str]:
        """What the newest checkpoint holds: `params`, and in a training run `rest`."""
        folder = self._folder / str(self.latest_step)
        return {path.name for path in folder.iterdir() if path.is_dir()}

    def _first_intact(
        self, read: Callable[[int], Result], first: int | None, check: Callable[[Result], None] = lambda found: None
    ) -> Result:
        """`read` of the first step for which it succeeds, and `check` after it: `first`, then the others, newest first.

        `check` may compute on all devices, so it starts only where every process has read its part.
        """
        steps = sorted(self._manager.all_steps(), key=lambda step: (step == first, step), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                with quiet():
                    result = distributed.together(functools.partial(_explained, read, step))
                    distributed.together(functools.partial(_explained, check, result))
            except Unreadable as error:
                damaged[step] = str(error)
                continue
            except InputError:
                damaged[step] = "another process cannot read its part"
                continue
            if damaged:
                self._report(damaged, step)
            return result
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise InputError(
            f"No checkpoint in {self._folder} can be read ({reasons or 'there is none'}). Restore the folder from a copy, or start "
            "again in a new --workdir."
        )

    def _report(self, damaged: dict[int, str], used: int) -> None:
        for step, reason in damaged.items():
            print(f"The checkpoint of step {step} in {self._folder} is damaged ({reason}).", flush=True)
        print(f"The one of step {used} is used.", flush=True)
        if self._read_only:
            return

        def move() -> None:
            for step in damaged:
                folder = self._folder / str(step)
                aside = next(path for n in range(1, 1000) if not (path := folder.with_name(f"{step}{DAMAGED}{n}")).exists())
                folder.rename(aside)

        distributed.on_primary(move)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong there."""
        with _explain_full_disk(self._folder), quiet():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends background work. What failed there has been raised by `save` or `wait`; if not, it is raised here."""
        failing = sys.exc_info()[0] is not None
        with quiet(), contextlib.suppress(Exception) if failing else _explain_full_disk(self._folder):
            self._manager.close()


def checksums(tree: Any) -> dict[str, int]:
    """A number for every array of a tree, by path, that depends on every bit and its place, but not on shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = np.asarray(jax.device_get(_checksums([leaf for _, leaf in leaves])))
    return {_name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


def verify(tree: Any, expected: dict[str, int]) -> None:
    """Raises ValueError if an array of a tree is not the one whose checksum was taken."""
    wrong = [name for name, value in checksums(tree).items() if expected[name] != value]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more} is not what was saved")


@jax.jit
def _checksums(leaves: list[Any]) -> Any:
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # The finaliser of MurmurHash3: every bit, and the place, changes all bits of what is added up. Sums of integers wrap around and do
    # not depend on their order.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _name(path: Any) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="/"))


class Unreadable(InputError):
    """A checkpoint is not what was written."""


def _explained(read: Callable[[Any], Result], argument: Any) -> Result:
    try:
        return read(argument)
    except Exception as error:  # Whatever orbax and the libraries below it make of a damaged file.
        raise Unreadable(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error


class _explain_full_disk:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        seen: BaseException | None = error
        while seen is not None:
            full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or "No space left" in str(seen) or "quota exceeded" in str(seen).lower():
                raise InputError(
                    f"The disk is full: a checkpoint could not be written to {self._folder}. The checkpoints before it are good. "
                    "Free some space and give the same command again; it goes on from the last one."
                ) from error
            seen = seen.__cause__ or seen.__context__


def run_checkpoints(run: Path, config: Any = None) -> Checkpoints:
    """The checkpoints of an existing run, for reading.

    Args:
      run: its folder.
      config: of the run; says whether the best checkpoint is used. Default: the newest.

    Raises:
      InputError: there are none.
    """
    if not (run / FOLDER).is_dir():
        problem = "holds no checkpoint yet" if run.is_dir() else "is not the folder of a run"
        raise InputError(f"{run} {problem}. Let its training go on until it has saved one, or name another run.")
    found = _reader(run, config)
    if found.latest_step is None:
        raise InputError(f"{run} holds no complete checkpoint. Let its training go on until it has saved one.")
    return found


def _reader(run: Path, config: Any) -> Checkpoints:
    if config is None:
        return Checkpoints(run, read_only=True)
    return Checkpoints(run, keep_best=config.checkpoint.keep_best, best=config.checkpoint.best, read_only=True)


def chosen_step(run: Path, config: Any) -> int | None:
    """The step that evaluation and prediction use: the best if the run keeps the best, otherwise the newest; None if there is none."""
    if not (run / FOLDER).is_dir():
        return None
    with contextlib.closing(_reader(run, config)) as found:
        return found.chosen_step


def used_bytes(run: Path) -> int:
    """Disk that the checkpoints of a run take."""
    return sum(path.stat().st_size for path in (run / FOLDER).rglob("*") if path.is_file())


def newest_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint of the run in `run`; None if there is none, or no such folder."""
    if not (run / FOLDER).is_dir():
        return None
    with contextlib.closing(Checkpoints(run, read_only=True)) as found:
        return found.latest_step
