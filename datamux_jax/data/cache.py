"""The cache folder of prepared data: where it is, who may write there, and what to say when that fails.

    CACHE/files/KEY/memory.json           hashes of text files, so that unchanged ones are not read again
    CACHE/tokenizers/KEY/tokenizer.json   tokenizers trained on running text
    CACHE/tokens/KEY/                     tokenised running text
    CACHE/converted/KEY/run/              published weights as a run, to start from

A key is a hash of everything that changes the result, so an entry never becomes wrong; all of them may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamux_jax.errors import InputError

VARIABLE = "DATAMUX_CACHE"
DEFAULT = "~/.cache/datamux_jax"
LOCK = ".lock"
META = "meta.json"


def folder(data: Any) -> Path:
    """The cache folder of `config.data`: `data.cache`, else `$DATAMUX_CACHE`, else `~/.cache/datamux_jax`.

    Raises:
      InputError: the folder starts with `~`, and nobody knows where the home folder is.
    """
    path = data.cache or os.environ.get(VARIABLE) or DEFAULT
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"The cache folder {path} cannot be found: {error} Set data.cache or ${VARIABLE} to a folder that you can write to."
        ) from error


def digest(*parts: Any) -> str:
    """Hexadecimal hash, 32 digits, of values that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def claimed(entry: Path, doing: str) -> Iterator[None]:
    """Makes the folder `entry` and holds it for this process; the system lets go of it when the process ends, however it ends.

    While another process holds it, this one says so on stdout and waits.

    Args:
      entry: a folder in the cache.
      doing: what the process that holds it is doing, such as "tokenising this text".

    Raises:
      InputError: the folder cannot be made or locked.
    """
    with contextlib.ExitStack() as stack:
        with writing(entry):
            entry.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(entry / LOCK, "w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another process is {doing}; waiting for it.", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes at `path` in the cache, and nothing else.

    Raises:
      InputError: the system refused, for want of space or permission for instance.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"The cache cannot be written at {path}: {error.strerror or error}. Free some space or get the permission, and run the "
            f"same command again, which goes on where this one stopped; or set data.cache or ${VARIABLE} to another folder."
        ) from error
