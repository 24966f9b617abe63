"""What all entry points share: flags parsed and errors shown the way a person wants to read them."""

from __future__ import annotations

import errno
import logging as python_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from datamux_jax.errors import InputError, Interrupted, Unavailable


def run(main: Callable[[Sequence[str]], None], *, goes_on: bool | Callable[[], bool] = True) -> None:
    """Parses flags and calls `main`. Bad input ends with one paragraph and exit code 2, an interruption with 130.

    What may work when it is tried again (another host does not answer) ends with 1. `goes_on`: after an interruption the same command
    goes on where it was; a function, if that depends on the flags.
    """
    # Below these levels nothing concerns the person who runs the command.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    python_logging.getLogger("jax").setLevel(python_logging.ERROR)
    logging.set_verbosity(logging.FATAL)

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"Unexpected argument {argv[1]!r}: everything is a flag here, written --name=value. Try --help.")
        try:
            main(argv)
        except InputError as error:
            _fail(str(error))
        except Unavailable as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        except Interrupted as error:
            print(error, flush=True)
            sys.exit(130)
        except KeyboardInterrupt:
            continued = goes_on() if callable(goes_on) else goes_on
            way_on = "; the same command goes on from there" if continued else ""
            print(f"\nStopped. What was saved stays{way_on}.", file=sys.stderr, flush=True)  # Standard output may be data.
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            way_out = "Free some space" if error.errno == errno.ENOSPC else "Check the path, its permissions and the disk"
            _fail(f"{error}. {way_out}, and give the same command again; what was saved before is good.")

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            # ml_collections reports a missing file only when the config is first used.
            open(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]).close()
        return rest
    except OSError as error:
        _fail(
            f"The config file cannot be read: {_first_line(error)}. Give its path, for instance --config=configs/quickstart.py."
        )
    except AttributeError as error:
        problem = " ".join(_first_line(error).replace("\\n", " ").replace("\\'", "").strip("\"'").split())
        name, _, hint = problem.partition(" Did you mean")
        hint = f" Did you mean{hint}" if hint else ""
        _fail(
            f"A --config flag or the config file sets {name!r}, which is no config key.{hint} configs/common.py lists all keys."
        )
    except Exception as error:
        # absl turns what a config file raises into text; our own errors end that text.
        _, ours, message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")
        if ours:
            _fail(message.strip())
        if not isinstance(error, flags.Error) or "Traceback" in str(error):
            traceback.print_exc()
            _fail("The config file fails when it is run; the error is above.")
        problem = re.sub(r"^flag --\w+=\S*: (?=--)", "", _first_line(error))
        _fail(f"{problem}. Try --help for the flags, and configs/common.py for the keys of --config.")


def _first_line(error: Exception) -> str:
    text = str(error) if isinstance(error, OSError) or not error.args else str(error.args[0])
    return " ".join(text.split()).rstrip(".")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def required(*names: str) -> None:
    """Marks flags as required: missing or empty, the command ends before it starts."""
    for name in names:
        flags.register_validator(name, bool, f"--{name} is required")
    if "workdir" in names:
        flags.register_validator(
            "workdir",
            lambda name: "://" not in name,
            "--workdir is a folder: mount the bucket (docs/pods.md), and give the path",
        )
