"""The one exception that means: the input is wrong, and here is the way out."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class InputError(ValueError):
    """A value that came from outside (flag, config, file, label, checkpoint) breaks a rule.

    The message is one paragraph: the value, the rule, the way out. The launchers print it without a traceback.
    """


class Unavailable(Exception):
    """Something outside that is needed (another host) does not answer; the same command may work later."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to this moment is saved."""


def few(items: Sequence[str], most: int = 8) -> str:
    """The first ones of a list, for an error that must stay one paragraph."""
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def brief(error: Exception) -> str:
    """The first line of a library's message, as a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(":. ") + "."


def choose(table: Collection[str], name: str, what: str) -> str:
    """Returns `name` if it is a key of `table`.

    Raises:
      InputError: if it is not; the message lists the choices.
    """
    if name not in table:
        raise InputError(f"{what} {name!r} does not exist. Choose one of: {', '.join(sorted(table))}.")
    return name
