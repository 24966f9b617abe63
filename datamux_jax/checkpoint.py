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

from datamux_jax import distributed, saved
from datamux_jax.errors import InputError
from datamux_jax.progress import quiet

DAMAGED = ".damaged"
Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints below `run`: parameters, the rest of the state, and a record (`saved.py`) together, written asynchronously.

    A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones good. Each holds
    a checksum of every array. What cannot be read, or reads as something else than was written, is reported, and the checkpoint
    before it takes its place.

    Among several processes all methods are called by all.

    Args:
      run: folder of the run.
      config: of the run; says which checkpoints stay, and which is best. None: the newest stays.
      read_only: for reading alone, also while another process writes.
      alone: this process writes arrays that it has whole, and no other takes part.
    """

    def __init__(self, run: Path, config: Any = None, *, read_only: bool = False, alone: bool = False) -> None:
        self._run, self._folder, self._config, self._read_only = run, (run / saved.FOLDER).absolute(), config, read_only
        self._manager: Any = None
        if read_only:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        several: dict[str, Any] = {"multiprocessing_options": _alone()} if alone else {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policy(config), create=False, cleanup_tmp_directories=not alone, **several
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler(**several) for name in ("params", "rest")}
        handlers[saved.RECORD] = ocp.JsonCheckpointHandler(**several)
        with quiet():
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        params: Any,
        rest: Any = None,
        host: dict[str, Any] | None = None,
        scores: dict[str, float] | None = None,
    ) -> None:
        """Starts to save; returns as soon as the state is copied. Parameters alone make a run to start from, not to resume.

        Args:
          step: the number of updates so far.
          params: parameters.
          rest: rest of the state.
          host: what the host needs to go on, as JSON has it.
          scores: of an evaluation at this step.

        Raises:
          InputError: the disk is full. The checkpoints before stay good.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(params)}
        if rest is not None:
            items["rest"] = ocp.args.StandardSave(rest)
        tree = {"params": params, "rest": rest}
        record = {"checksums": checksums(tree), "shapes": shapes(tree), "host": host, "scores": scores}
        items[saved.RECORD] = ocp.args.JsonSave(record)
        with _explain_full_disk(self._folder), quiet():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)

    def restore(self, params: Any, rest: Any) -> tuple[int, Any, Any, Any]:
        """Restores the newest intact checkpoint; damaged ones after it are moved aside.

        Args:
          params: abstract parameters with shardings.
          rest: abstract rest of the state with shardings.

        Returns:
          Its step, parameters, rest of the state, and what the host needs.

        Raises:
          InputError: none is intact.
        """
        step, found = self._first_intact(saved.newest_step, {"params": params, "rest": rest})
        return step, found["params"], found["rest"], found[saved.RECORD]["host"]

    def restore_params(self, params: Any) -> tuple[int, Any]:
        """Restores the parameters of the chosen checkpoint alone (`saved.chosen_step`), and says which step it is.

        Raises:
          InputError: none is intact.
        """
        step, found = self._first_intact(functools.partial(saved.chosen_step, config=self._config), {"params": params})
        return step, found["params"]

    def newest_intact(self, params: Any) -> int:
        """The step of the newest checkpoint whose parameters can be read; damaged ones after it are moved aside.

        Raises:
          InputError: there is none.
        """
        return self._first_intact(saved.newest_step, {"params": params})[0]

    def _first_intact(self, first: Callable[[Path], int | None], abstract: dict[str, Any]) -> tuple[int, Any]:
        """The first checkpoint that can be read and is what was written: `first`, then the others, newest first."""

        def read(step: int) -> Any:
            record = saved.read(self._run, step)
            return {saved.RECORD: record} | {
                name: _read_item(self._folder / str(step) / name, tree) for name, tree in abstract.items()
            }

        def check(found: Any) -> None:
            verify({name: found[name] for name in abstract}, found[saved.RECORD]["checksums"])

        damaged: dict[int, str] = {}
        seen: set[int] = set()
        # Process 0 looks for all: each could find something else while another process writes, or see an older state of a shared disk.
        while untried := distributed.from_primary(lambda: self._untried(first, seen)):
            seen.add(step := untried[0])
            try:
                # `check` computes on all devices, so it starts only where every process has read its part.
                with quiet():
                    found = distributed.together(functools.partial(_explained, read, step))
                    distributed.together(functools.partial(_explained, check, found))
            except InputError as error:
                if distributed.from_primary(functools.partial(self._has, step)):
                    damaged[step] = str(error) if isinstance(error, Unreadable) else "another process cannot read its part"
                continue  # What is gone was deleted by the process that trains there, which has written a newer one.
            # Deleting takes a while: what was still there in parts may be gone by now.
            there = distributed.from_primary(lambda: saved.steps(self._run))
            if damaged := {bad: reason for bad, reason in damaged.items() if bad in there}:
                self._report(damaged, step)
            return step, found
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise InputError(
            f"No checkpoint in {self._folder} can be read ({reasons or 'there is none'}). Restore the folder from a copy, or start "
            "again in a new --workdir."
        )

    def _has(self, step: int) -> bool:
        return step in saved.steps(self._run)

    def _untried(self, first: Callable[[Path], int | None], seen: set[int]) -> list[int]:
        chosen = first(self._run)
        there = sorted(saved.steps(self._run), key=lambda step: (step == chosen, step), reverse=True)
        return [step for step in there if step not in seen]

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
        if self._manager is not None:
            with _explain_full_disk(self._folder), quiet():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends background work. What failed there has been raised by `save` or `wait`; if not, it is raised here."""
        if self._manager is None:
            return
        failing = sys.exc_info()[0] is not None
        with quiet(), contextlib.suppress(Exception) if failing else _explain_full_disk(self._folder):
            self._manager.close()


def reader(run: Path, config: Any = None) -> Checkpoints:
    """The checkpoints of an existing run, for reading.

    Args:
      run: its folder.
      config: of the run; says whether the best checkpoint is used. Default: the newest.

    Raises:
      InputError: there are none.
    """
    distributed.on_primary(lambda: _require(run))
    return Checkpoints(run, config, read_only=True)


def _require(run: Path) -> None:
    saved.record(run)


def _read_item(folder: Path, abstract: Any) -> Any:
    """The arrays in `folder`; every process reads its own part and waits for no other, so that one may fail alone."""
    alone = _alone()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as found:
        return found.restore(folder, args=ocp.args.StandardRestore(abstract))


def _alone() -> Any:
    """Options of orbax for a process that works by itself."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}")


def _policy(config: Any) -> Any:
    """Which checkpoints stay."""
    if config is None:
        return preservation_policy.LatestN(1)
    policies: list[Any] = [preservation_policy.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_best:
        score = functools.partial(saved.best, name=config.checkpoint.best)
        best = preservation_policy.BestN(
            n=config.checkpoint.keep_best, get_metric_fn=score, keep_checkpoints_without_metrics=False
        )
        policies.append(best)
    return preservation_policy.AnyPreservationPolicy(policies)


def checksums(tree: Any) -> dict[str, int]:
    """A number for every array of a tree, by path, that depends on every bit and its place, but not on shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = np.asarray(jax.device_get(_checksums([leaf for _, leaf in leaves])))
    return {_name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


def shapes(tree: Any) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every array of a tree, by path."""
    return {_name(path): (list(leaf.shape), str(leaf.dtype)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # It says nothing about the file.
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
