"""Peak memory of one contender, in a process of its own: what others hold, and what compiling took, does not count."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import functools
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from datamux_jax.errors import InputError

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CALLS = 3
Result = TypeVar("Result")


def check() -> None:
    """Raises InputError where the system does not tell a process its peak."""
    if not (CLEAR.exists() and STATUS.exists()):
        raise InputError("--memory=process reads /proc/self/status, which this system does not have. Use --memory=program.")


def resident(key: str) -> int:
    """`VmHWM`, the peak resident memory of this process since `reset`, or `VmRSS`, that of now; bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def reset() -> None:
    """Forgets the peak so far."""
    CLEAR.write_text("5")


def of_calls(make: Callable[[], Callable[[], Any]]) -> dict[str, int]:
    """Peaks while what `make` returns is called.

    Returns:
      `peak_rss_bytes`, libraries and parameters included; `idle_rss_bytes`, before `make`; where the device counts, also
      `device_peak_bytes`, of the process so far.
    """
    idle = resident("VmRSS")
    call = make()
    gc.collect()
    reset()
    for _ in range(CALLS):
        jax.block_until_ready(call())
    found = {"peak_rss_bytes": resident("VmHWM"), "idle_rss_bytes": idle}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["device_peak_bytes"] = stats["peak_bytes_in_use"]
    return found


@functools.cache
def devices() -> int:
    """Devices of this machine, counted by a process that ends: one that counts them itself takes them, and measures beside others."""
    return in_own_process(jax.device_count)


def in_own_process(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise InputError(
                "--memory=process: the process whose memory is measured was killed, which happens where memory runs out. Give smaller "
                "batches, leave that network out, or use --memory=program."
            ) from error
