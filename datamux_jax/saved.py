"""What lies in the checkpoint folder of a run, from its files alone: no process waits for another, no array is read.

Beside its arrays every checkpoint has a record: a checksum, shape and type of each array, the scores of the evaluation at its step,
and what the host needs to go on (position in the data, sums of a log line that is not full yet).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from datamux_jax import workdir
from datamux_jax.data import cache
from datamux_jax.errors import InputError

FOLDER = "checkpoints"
RECORD = "run"  # The item of a checkpoint that holds it; orbax calls the file in it as it does.
RECORD_FILE = "metadata"
LOWER_IS_BETTER = ("loss", "error")


def steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints of the run in `run`, ascending; a checkpoint gets its final name when it is complete."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def newest_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint; None if there is none."""
    return next(reversed(steps(run)), None)


def best(score: dict[str, float], name: str) -> float:
    """A score under which more is better."""
    return -score[name] if name.endswith(LOWER_IS_BETTER) else score[name]


def chosen_step(run: Path, config: Any = None) -> int | None:
    """The step that evaluation, prediction and `init_from` use: the best if the run keeps the best, otherwise the newest.

    None if there is none.
    """
    if config is not None and config.checkpoint.keep_best:
        name = config.checkpoint.best
        scores = [(best(found["scores"], name), step) for step, found in _records(run) if name in (found["scores"] or {})]
        if scores:
            return max(scores)[1]
    return newest_step(run)


def identity(run: Path, config: Any, step: int | None) -> str:
    """Text that is another one for other parameters: of the run in `run` with its config, at a step."""
    return f"{run}, step {step}, {cache.digest(workdir.plain(config))}"


def record(run: Path, config: Any = None) -> dict[str, Any]:
    """The record of the chosen checkpoint; if it is damaged, of the newest one that is not.

    Raises:
      InputError: there is none.
    """
    if not (run / FOLDER).is_dir():
        problem = "holds no checkpoint yet" if run.is_dir() else "is not the folder of a run"
        raise InputError(f"{run} {problem}. Let its training go on until it has saved one, or name another run.")
    if not steps(run):
        raise InputError(f"{run} holds no complete checkpoint. Let its training go on until it has saved one.")
    found = dict(_records(run))
    if not found:
        raise InputError(f"No checkpoint in {run / FOLDER} can be read. Restore the folder from a copy, or name another run.")
    chosen = chosen_step(run, config)
    return found[chosen if chosen in found else max(found)]


def shapes(found: dict[str, Any], item: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every array of an item (`params`, `rest`) of a record, by path."""
    prefix = f"{item}/"
    return {
        name.removeprefix(prefix): (tuple(shape), dtype)
        for name, (shape, dtype) in found["shapes"].items()
        if name.startswith(prefix)
    }


def used_bytes(run: Path) -> int:
    """Disk that the checkpoints of a run take."""
    total = 0
    for step in steps(run):
        for path in (run / FOLDER / str(step)).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # Deleted by the process that trains there.
                total += path.stat().st_size
    return total


def read(run: Path, step: int) -> dict[str, Any]:
    """The record of one checkpoint.

    Raises:
      InputError: it cannot be read.
    """
    return workdir.read_json(run / FOLDER / str(step) / RECORD / RECORD_FILE)


def _records(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Step and record of every checkpoint whose record can be read, ascending."""
    found = []
    for step in steps(run):
        try:
            found.append((step, read(run, step)))
        except InputError:
            continue  # Damaged, or deleted since: restoring reports it.
    return found
