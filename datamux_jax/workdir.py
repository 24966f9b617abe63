"""The folder of a run: who may write there, what lies there, and how files get there whole.

    RUN/config.json        the complete config
    RUN/format.json        how inputs become arrays; label names
    RUN/tokenizer/         of texts
    RUN/checkpoints/STEP/  orbax: params, rest (optimizer, step, random key), run (data position, checksums)
    RUN/teacher.npy        outputs to learn from, with teacher.json, if another run teaches
    RUN/metrics.jsonl      one line a logged step
    RUN/metrics.json       the last evaluation

An experiment of several runs has one such folder a run below its own, and `report.md`, `report.json`, `report.png`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from datamux_jax.errors import InputError, few

CONFIG = "config.json"
LOCK = ".lock"
TEMPORARY = ".tmp"
# May differ between the saved and the given config: they change no number of the run.
FREE_KEYS = (
    *("log_every", "tensorboard", "wandb", "checkpoint.", "data.cache"),
    *("mesh.", "remat", "logits_mib", "scan_layers", "attention"),
)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there takes the place of `path` at the end, unless it failed."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: it cannot be read, or is not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}: {error}. Restore the file, or start again in a new folder.") from error
    if not isinstance(value, dict):
        raise InputError(f"Cannot read {path}: it holds no JSON object. Restore the file, or start again in a new folder.")
    return value


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as JSON has it: nested dicts and lists."""
    return json.loads(json.dumps(config.to_dict()))


def load_single(run: Path, name: str) -> ml_collections.ConfigDict:
    """The config of a run that is none of several.

    Args:
      run: its folder.
      name: what an error calls it.

    Raises:
      InputError: the folder is no run, or an experiment of several.
    """
    config = load_config(run)
    if config.runs:
        raise InputError(
            f"{name} is an experiment of several runs. Name one of them: {', '.join(str(run / one) for one in config.runs)}."
        )
    return config


def load_config(run: Path) -> ml_collections.ConfigDict:
    """The config saved in `run`.

    Raises:
      InputError: the folder is missing or is not a run.
    """
    if not (run / CONFIG).is_file():
        problem = f"holds no {CONFIG}" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise InputError(f"{run} is not the folder of a run: it {problem}. Pass the --workdir of a training run.")
    return ml_collections.ConfigDict(read_json(run / CONFIG))


def find(name: str, workdir: Path) -> Path:
    """What a config names (`../n2-warmup`): relative to `workdir`, if it is there, else to the current folder."""
    # Normalised as text: the workdir itself may not exist yet.
    beside = Path(os.path.normpath(workdir / name))
    return beside if beside.exists() else Path(name)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nearest(folder: Path) -> Path:
    """`folder`, or what exists of its parents."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def obstacle(folder: Path) -> str:
    """Why files cannot be written to `folder`, which need not exist yet; "" where they can."""
    existing = nearest(folder)
    if existing.is_dir() and os.access(existing, os.W_OK):
        return ""
    return f"{'no permission in' if existing.is_dir() else 'this is a file:'} {existing}"


@contextlib.contextmanager
def claimed(
    workdir: Path, config: ml_collections.ConfigDict, needed_bytes: int, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Makes `workdir` the folder of the run that `config` describes, or checks that it is, and holds it as `lock` does.

    Args:
      workdir: the folder.
      config: of the run.
      needed_bytes: disk that it still needs.
      check: further checks, done while the folder is held and before anything is written.

    Raises:
      InputError: the folder belongs to another config or another process, holds other files, cannot be written, or its disk is too
        full. Nothing has been written then.
    """
    if (workdir / CONFIG).exists():
        _same_config(workdir, config)
    elif workdir.exists() and (not workdir.is_dir() or set(os.listdir(workdir)) - {LOCK, CONFIG + TEMPORARY}):
        raise InputError(
            f"--workdir={workdir} exists and is not the folder of a run (it holds no {CONFIG}), so nothing is written there. "
            "Choose a new or empty folder."
        )
    if problem := obstacle(workdir):
        raise InputError(f"--workdir={workdir} cannot be written: {problem}. Choose another folder.")
    free = shutil.disk_usage(nearest(workdir)).free
    if free < needed_bytes:
        raise InputError(
            f"The disk of --workdir={workdir} has {free / 1e6:,.0f} MB left, but this run needs about {needed_bytes / 1e6:,.0f} MB "
            "for its checkpoints. Free some space, choose another disk, or lower checkpoint.keep."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with lock(workdir):
        check()
        if not (workdir / CONFIG).exists() or read_json(workdir / CONFIG) != plain(config):
            write_json(
                workdir / CONFIG, plain(config)
            )  # Also where a key has changed that may: what reads the folder goes by it.
        yield


def _same_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    old, new = flatten(read_json(workdir / CONFIG)), flatten(plain(config))
    different = [
        f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    ]
    if different:
        raise InputError(
            f"--workdir={workdir} belongs to a run with another config ({few(different, 12)}). Give the same config to go on with "
            "that run, or another --workdir to start a new one; nothing was changed."
        )


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds `workdir` for this process; the system lets go of it when the process ends, however it ends.

    Raises:
      InputError: another process holds it.
    """
    with open(workdir / LOCK, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another process is training in --workdir={workdir}. Wait for it, stop it, or choose another folder."
            ) from error
        yield
