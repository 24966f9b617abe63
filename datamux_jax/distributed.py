"""Several processes (hosts of a pod) that train together: how they find each other, agree, and fail together.

Every process runs the same program. Process 0 alone writes configs, metrics and reports; checkpoints are written by all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from datamux_jax.errors import InputError, Interrupted, Unavailable, brief

Result = TypeVar("Result")
_barriers = itertools.count()  # Every barrier has a name of its own.
_asked = itertools.count(1)
COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def initialize(*, multihost: bool = False, coordinator: str = "", num_processes: int = -1, process_id: int = -1) -> None:
    """Connects this process with the others, if there are any. Must come before anything else that touches a device.

    Args:
      multihost: find everything in the environment; JAX knows Cloud TPU, Slurm, GKE and Open MPI.
      coordinator: `host:port` of process 0, where the environment does not say it; also $JAX_COORDINATOR_ADDRESS.
      num_processes: how many there are; given with `coordinator`.
      process_id: which one this is, from 0; given with `coordinator`.

    Raises:
      InputError: the arguments do not fit together, or nothing says where the others are.
      Unavailable: the others do not answer.
    """
    given = [coordinator != "", num_processes >= 0, process_id >= 0]
    if any(given) and not all(given):
        raise InputError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: all three are needed, or none of "
            "them. On Cloud TPU, GKE and Slurm pass --multihost alone."
        )
    if all(given) and not process_id < num_processes:
        raise InputError(f"--process_id={process_id} is not below --num_processes={num_processes}. Number processes from 0.")
    try:
        if all(given):
            jax.distributed.initialize(coordinator, num_processes, process_id)
        elif multihost or os.environ.get(COORDINATOR):
            jax.distributed.initialize()
    except ValueError as error:
        raise InputError(
            f"This process cannot find the others: {brief(error)} Start one process on every host with the same command, or pass "
            "--coordinator, --num_processes and --process_id."
        ) from error
    except RuntimeError as error:
        raise Unavailable(
            f"The other processes do not answer: {brief(error)} See whether all of them run and reach process 0, and start again."
        ) from error


def is_primary() -> bool:
    """Whether this process writes what only one may write."""
    return bool(jax.process_index() == 0)


def together(action: Callable[[], Result]) -> Result:
    """Runs `action` on every process; if it fails on one of them, it fails on all, and none waits forever for another.

    Raises:
      InputError: `action` failed on another process; what it raises here is raised as it is.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    result: Result | None = None
    try:
        result = action()
    except Exception as error:  # Whatever it is, the others must not wait for this process.
        failure = error
    failed = np.asarray(multihost_utils.process_allgather(np.array([failure is not None]))).ravel()
    if failure is not None:
        raise failure
    if failed.any():
        where = ", ".join(str(index) for index in np.flatnonzero(failed))
        raise InputError(f"Process {where} cannot go on, so all stop; its own message says why. Nothing was lost.")
    return result  # type: ignore[return-value]


def primary_first(action: Callable[[], Result]) -> Result:
    """Runs `action` on process 0, and then on all others, which find what it has made on the shared disk.

    Raises:
      InputError: from `action`, here or on another process.
    """
    if jax.process_count() == 1:
        return action()
    outcome: list[tuple[Result | None, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((action(), None))
        except Exception as error:  # Told to the others below.
            outcome.append((None, error))

    # Barriers of the coordination service: unlike collectives of devices, they may take hours.
    if is_primary():
        run()
    _wait_for_all()
    if not is_primary():
        run()
    _wait_for_all()

    def tell() -> Result:
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    return together(tell)


def _wait_for_all() -> None:
    everyone = set(range(jax.process_count()))  # Without it, devices would wait, and collectives give up sooner.
    ocp.multihost.sync_global_processes(f"datamux_jax/{next(_barriers)}", timeout=7 * 24 * 3600, processes=everyone)


def on_primary(action: Callable[[], None]) -> None:
    """Runs `action` on process 0; the others wait, and fail if it fails.

    Raises:
      InputError: from `action`.
    """
    together(action if is_primary() else lambda: None)


def from_primary(action: Callable[[], Result]) -> Result:
    """What `action` gives on process 0, on all; for choices that must not differ because one sees an older state of a shared disk.

    Args:
      action: gives what JSON has.

    Raises:
      InputError: from `action`.
    """
    if jax.process_count() == 1:
        return action()
    answer = bytearray()
    on_primary(lambda: answer.extend(json.dumps(action()).encode()))
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    content = np.frombuffer(bytes(answer).ljust(size, b" "), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).astype(np.uint8).tobytes())


def check_same(texts: Mapping[str, str]) -> None:
    """Checks that all processes have the same texts, by name: the config, the data.

    Raises:
      InputError: on every process, if one of them has another text than process 0.
    """
    if jax.process_count() == 1:
        return
    ours = np.stack(
        [np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint8) for text in texts.values()]
    )
    all_PxKx8 = np.asarray(multihost_utils.process_allgather(ours))
    different = (all_PxKx8 != all_PxKx8[:1]).any(-1)
    if different.any():
        which = "; ".join(
            f"{name}: process {', '.join(map(str, np.flatnonzero(column)))}"
            for name, column in zip(texts, different.T, strict=True)
            if column.any()
        )
        raise InputError(
            f"Processes differ from process 0 ({which}), so they would train different networks. Give the same command on every host, "
            "with the same versions of the packages and the same files."
        )


def reached_stop(asked: bool) -> bool:
    """Whether to stop here: this process was asked to; or, among several, whether all have agreed to stop at this very call.

    JAX's coordination service watches for SIGTERM on every host and chooses a call that none has passed, so all processes call this
    equally often.
    """
    if jax.process_count() == 1:
        return asked
    return bool(multihost_utils.reached_preemption_sync_point(next(_asked)))


def stop_if_asked(where: str) -> None:
    """Among several processes, ends all of them if one was told to stop; for work that is simply done again.

    A single process needs no such call: the signal ends it where it is.

    Raises:
      Interrupted: one was.
    """
    if reached_stop(False):
        raise Interrupted(f"Stopped {where}. What was saved stays; the same command goes on from there.")
