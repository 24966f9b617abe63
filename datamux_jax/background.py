"""Work of the host in a thread of its own, while the device or the caller is busy with what came before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def background(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items, made in a thread that is at most `depth` items ahead; its errors are raised here."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(*entry: Any) -> None:
        while not stop.is_set():
            try:
                made.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    # A daemon: it may wait for standard input when the program ends.
    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, item = made.get()
            if not more:
                break
            yield item
    finally:
        stop.set()
    if item is not None:
        raise item
