"""Checkpoints of a run (orbax), and which of them a run starts from."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import grain
import jax
import orbax.checkpoint as ocp

from datamux_jax.errors import InputError

FOLDER = "checkpoints"
# May be absent from, or of another shape in, the parameters that a run starts from: a new task has a new head.
FRESH_HEADS = ("classifier",)


class Checkpoints:
    """The checkpoints below `run`: parameters, the rest of the state, and the data position together, written asynchronously.

    A checkpoint appears under its final name only when it is complete, so a kill at any moment leaves the older ones good.
    """

    def __init__(self, run: Path, keep: int = 1, *, read_only: bool = False) -> None:
        self._folder = (run / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
            if not read_only
            else ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0),
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

    def save(self, step: int, params: Any, rest: Any, data: grain.DatasetIterator) -> None:
        """Starts to save; returns as soon as the state is copied.

        Raises:
          InputError: the disk is full. The checkpoints before stay good.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            data=grain.checkpoint.CheckpointSave(data),
        )
        with _explain_full_disk(self._folder):
            self._manager.save(step, args=items, force=True)

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

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong there."""
        with _explain_full_disk(self._folder):
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
            if full or "No space left" in str(seen) or "RESOURCE_EXHAUSTED" in str(seen):
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
        raise InputError(f"{run} holds no checkpoint yet. Let its training go on until it has saved one.")
    found = Checkpoints(run, read_only=True)
    if found.latest_step is None:
        raise InputError(f"{run} holds no complete checkpoint. Let its training go on until it has saved one.")
    return found


def find_run(name: str, workdir: Path) -> Path:
    """The folder of the run that a config names: relative to `workdir` (`../n2-warmup`), else to the current folder."""
    beside = workdir / name
    return beside if beside.exists() else Path(name)


def init_from(run: Path, params: Any) -> Any:
    """Starts from the parameters of another run.

    Args:
      run: its folder.
      params: this run's fresh parameters, sharded.

    Returns:
      `params`, with every leaf that `run` has replaced. A task head (`FRESH_HEADS`) may be missing there or have another shape.

    Raises:
      InputError: other missing, surplus or misshapen leaves; all of them are listed.
    """
    source = run_checkpoints(run)
    theirs, ours = source.param_shapes(), {path: tuple(leaf.shape) for path, leaf in _flat(params).items()}
    fresh = {
        path for path in ours.keys() | theirs.keys() if path.startswith(FRESH_HEADS) and ours.get(path) != theirs.get(path)
    }
    missing = sorted(ours.keys() - theirs.keys() - fresh)
    surplus = sorted(theirs.keys() - ours.keys() - fresh)
    misshapen = sorted(path for path in ours.keys() & theirs.keys() - fresh if ours[path] != theirs[path])
    if missing or surplus or misshapen:
        details = [f"{path} is {theirs[path]} there and {ours[path]} here" for path in misshapen]
        raise InputError(
            f"init_from = {str(run)!r} does not fit this model. Missing there: {', '.join(missing) or 'nothing'}. Surplus there: "
            f"{', '.join(surplus) or 'nothing'}. Other shapes: {'; '.join(details) or 'none'}. Use a run with the same num_instances "
            "and the same model, mux and demux settings."
        )
    shared = [path for path in ours if path not in fresh]
    flat = _flat(params)
    whole = {
        path: jax.ShapeDtypeStruct(
            shape, flat[path].dtype if path in flat else "float32", sharding=flat[path].sharding if path in shared else None
        )
        for path, shape in theirs.items()
    }
    loaded = _flat(source.restore_params(_nested(whole)))
    return _nested({path: loaded[path] if path in shared else flat[path] for path in ours})


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _nested(flat: Mapping[str, Any]) -> Any:
    return flax.traverse_util.unflatten_dict(flat, sep="/")
