"""Checkpoints of a run (orbax), and which of them a run starts from."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from datamux_jax.errors import InputError

FOLDER = "checkpoints"
# May be absent from, surplus in, or of another shape in the parameters that a run starts from: a new task has a new head.
HEADS = ("classifier/", "replaced_head/", "decoder/", "generator/")
# May be absent besides if the run to start from is a plain network.
MULTIPLEXING = ("mux/", "demux/")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what orbax logs about its own options and failures; failures reach the caller as exceptions."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


class Checkpoints:
    """The checkpoints below `run`: parameters, the rest of the state, and the data position together, written asynchronously.

    A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones good.
    """

    def __init__(self, run: Path, keep: int = 1, *, read_only: bool = False) -> None:
        self._folder = (run / FOLDER).absolute()
        with quiet():
            self._manager = self._open(keep, read_only)

    def _open(self, keep: int, read_only: bool) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
            if not read_only
            else ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0),
            # Named here, an item's metadata can be read without restoring it.
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "rest": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any = None, data: grain.DatasetIterator | None = None) -> None:
        """Starts to save; returns as soon as the state is copied. Parameters alone make a run to start from, not to resume.

        Raises:
          InputError: the disk is full. The checkpoints before stay good.
        """
        items = {"params": ocp.args.StandardSave(params)}
        if rest is not None:
            items |= {"rest": ocp.args.StandardSave(rest), "data": grain.checkpoint.CheckpointSave(data)}
        with _explain_full_disk(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, params: Any, rest: Any, data: grain.DatasetIterator) -> tuple[Any, Any]:
        """Restores the newest checkpoint: `(params, rest)`; the iterator's position is set in place.

        Args:
          params: abstract parameters with shardings.
          rest: abstract rest of the state with shardings.
          data: iterator to set.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            rest=ocp.args.StandardRestore(rest),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        restored = self._manager.restore(self.latest_step, args=items)
        return restored["params"], restored["rest"]

    def restore_params(self, params: Any) -> Any:
        """Restores the parameters of the newest checkpoint alone."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return self._manager.restore(self.latest_step, args=items)["params"]

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the newest checkpoint's parameters, by path."""
        tree = self._manager.item_metadata(self.latest_step)["params"].tree
        return {path: tuple(leaf.shape) for path, leaf in _flat(tree).items()}

    def items(self) -> set[str]:
        """What the newest checkpoint holds: parameters, and in a training run `rest` and `data`."""
        folder = self._folder / str(self.latest_step)
        return {path.name for path in folder.iterdir() if path.is_dir()}

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong there."""
        with _explain_full_disk(self._folder), quiet():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class _explain_full_disk:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        seen: BaseException | None = error
        while seen is not None:
            full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or "No space left" in str(seen):
                raise InputError(
                    f"The disk is full: a checkpoint could not be written to {self._folder}. The checkpoints before it are good. "
                    "Free some space and give the same command again; it goes on from the last one."
                ) from error
            seen = seen.__cause__ or seen.__context__


def run_checkpoints(run: Path) -> Checkpoints:
    """The checkpoints of an existing run, for reading.

    Raises:
      InputError: there are none.
    """
    if not (run / FOLDER).is_dir():
        problem = "holds no checkpoint yet" if run.is_dir() else "is not the folder of a run"
        raise InputError(f"{run} {problem}. Let its training go on until it has saved one, or name another run.")
    found = Checkpoints(run, read_only=True)
    if found.latest_step is None:
        raise InputError(f"{run} holds no complete checkpoint. Let its training go on until it has saved one.")
    return found


def find_run(name: str, workdir: Path) -> Path:
    """The folder of the run that a config names: relative to `workdir` (`../n2-warmup`), else to the current folder."""
    # Normalised as text: the workdir itself may not exist yet.
    beside = Path(os.path.normpath(workdir / name))
    return beside if beside.exists() else Path(name)


def newest_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint of the run in `run`; None if there is none, or no such folder."""
    if not (run / FOLDER).is_dir():
        return None
    with contextlib.closing(Checkpoints(run, read_only=True)) as found:
        return found.latest_step


def check_resumable(run: Path) -> None:
    """Raises InputError if the run in `run` has parameters only, like one that was converted."""
    with contextlib.closing(run_checkpoints(run)) as found:
        if not {"rest", "data"} <= found.items():
            raise InputError(
                f"resume = {str(run)!r} has parameters but no training state, as it was converted from a published checkpoint. Use "
                "init_from to start a training from its parameters."
            )


def match(
    run: Path, params: Any, key: str = "init_from", fresh: tuple[str, ...] = HEADS
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Checks that a network with the parameters `params` (abstract or real) can start from the run in `run`.

    Args:
      run: its folder.
      params: of the network, with shapes.
      key: config key that names the run, for the error.
      fresh: what may be missing there, surplus or of another shape; by default heads. If heads may, a multiplexed network may start
        from a plain one.

    Returns:
      The shapes of all parameters there, by path; and the paths that both networks share.

    Raises:
      InputError: there is no checkpoint, or other leaves are missing, surplus or misshapen; all of them are listed.
    """
    with contextlib.closing(run_checkpoints(run)) as source:
        theirs = source.param_shapes()
    ours = {path: tuple(leaf.shape) for path, leaf in _flat(params).items()}
    shared = {path for path in ours if ours[path] == theirs.get(path)}
    mixed, theirs_mixed = (any(path.startswith(MULTIPLEXING) for path in paths) for paths in (ours, theirs))
    if fresh and not theirs_mixed:
        fresh = fresh + MULTIPLEXING
    if mixed == theirs_mixed and all(any(path.startswith("decoder/") for path in paths) for paths in (ours, theirs)):
        fresh = tuple(prefix for prefix in fresh if prefix != "decoder/")  # Where both have one, it is the same or a mistake.
    wrong = {path for path in (ours.keys() | theirs.keys()) - shared if not path.startswith(fresh)}
    if wrong:
        missing = sorted(wrong - theirs.keys())
        surplus = sorted(wrong - ours.keys())
        misshapen = [
            f"{path} is {theirs[path]} there and {ours[path]} here" for path in sorted(wrong & ours.keys() & theirs.keys())
        ]
        raise InputError(
            f"{key} = {str(run)!r} does not fit this model. Missing there: {', '.join(missing) or 'nothing'}. Surplus there: "
            f"{', '.join(surplus) or 'nothing'}. Other shapes: {'; '.join(misshapen) or 'none'}. Use a run with the same num_instances "
            "and the same model, mux and demux settings."
        )
    return theirs, shared


def init_from(run: Path, params: Any) -> tuple[Any, str]:
    """Starts from the parameters of another run.

    Args:
      run: its folder.
      params: this run's fresh parameters, sharded.

    Returns:
      `params`, with every leaf that both share taken from `run`; and what stayed fresh or was not used there, for people.

    Raises:
      InputError: as `match`.
    """
    theirs, shared = match(run, params)
    ours = _flat(params)
    wanted = {
        path: jax.ShapeDtypeStruct(shape, "float32", sharding=ours[path].sharding if path in shared else None)
        for path, shape in theirs.items()
    }
    with contextlib.closing(run_checkpoints(run)) as source:
        loaded = _flat(source.restore_params(_nested(wanted)))
    merged = _nested({path: loaded[path] if path in shared else leaf for path, leaf in ours.items()})
    notes = (("fresh", ours), ("not used", theirs))
    left = [f"; {what}: {', '.join(_groups(set(paths) - shared))}" for what, paths in notes if set(paths) - shared]
    return merged, "".join(left)


def _groups(paths: set[str]) -> list[str]:
    """The first two levels of parameter paths: `demux/keys`, `classifier/out`."""
    return sorted({"/".join(path.split("/")[:2]) for path in paths})


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _nested(flat: Mapping[str, Any]) -> Any:
    return flax.traverse_util.unflatten_dict(flat, sep="/")
