"""What a person sees while a job runs: one line with step, numbers and time left."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator

from absl import logging


@contextlib.contextmanager
def quiet(level: int = logging.FATAL) -> Iterator[None]:
    """Silences what libraries log through absl below `level`; failures reach the caller as exceptions."""
    before = logging.get_verbosity()
    logging.set_verbosity(level)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `4000` -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Reports progress on stdout: rewritten in place on a terminal, a line every `seconds` elsewhere.

    Args:
      label: stands at the start of the line.
      total: number of units of work; None where nobody knows: the line has a rate then, and no time left.
      start: units that were done before (a resumed run).
      seconds: shortest time between two lines where stdout is not a terminal.
    """

    def __init__(self, label: str, total: int | None, start: int = 0, seconds: float = 10.0) -> None:
        self._label, self._total, self._start = label, total, start
        self._terminal = sys.stdout.isatty()
        self._seconds = 0.2 if self._terminal else seconds
        self._began = self._shown = time.monotonic()
        self._width = 0

    def restart_clock(self, done: int) -> None:
        """Forgets the time so far: what came before (compilation) says nothing about the rate."""
        self._start, self._began = done, time.monotonic()

    def update(self, done: int, text: str = "") -> None:
        """Shows `done` units and `text`, if it is time to."""
        now = time.monotonic()
        if now - self._shown < self._seconds and (self._total is None or done < self._total):
            return
        self._shown = now
        rate = (done - self._start) / max(now - self._began, 1e-9)
        text = "  " + text if text else ""
        if self._total is None:
            self._show(f"{self._label}  {done:,}{text}  {rate:,.0f}/s")
            return
        left = f"  {duration((self._total - done) / rate)} left" if rate > 0 and done < self._total else ""
        self._show(f"{self._label}  {done}/{self._total}{text}{left}")

    def close(self) -> None:
        """Ends the line."""
        if self._terminal and self._width:
            print(flush=True)
            self._width = 0

    def _show(self, line: str) -> None:
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # A wrapped line cannot be rewritten.
            print("\r" + line.ljust(self._width), end="", flush=True)
            self._width = len(line)
        else:
            print(line, flush=True)
