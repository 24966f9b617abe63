"""Exported predictors: `predictor = datamux_jax.load_exported(DIR)`. Needs jax and the tokenizer, but no network code.

    DIR/export.json         what it is: objective, N, groups a batch, row lengths, platforms, jax version
    DIR/program-L.bin       `jax.export` artifact for rows of `L` positions: (params, inputs [b,N,L], mask [b,N,L]) -> logits, for any b
    DIR/params.npz          parameters, by name
    DIR/format.json         how inputs become arrays; label names
    DIR/tokenizer/          of texts

The programs are StableHLO with version. jax promises that an artifact can be read by releases of the next 6 months, and by those of the
3 weeks before (https://docs.jax.dev/en/latest/export/export.html, "Compatibility guarantees"); in practice longer. To use one later,
export the run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from datamux_jax import workdir
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError
from datamux_jax.inference import Inference

MANIFEST = "export.json"
PARAMS = "params.npz"
VERSION = 1


def program_file(length: int) -> str:
    """Name of the program for rows of `length` positions."""
    return f"program-{length}.bin"


def is_export(folder: Path) -> bool:
    """Whether the folder holds an exported predictor."""
    return (folder / MANIFEST).is_file()


def identity(folder: Path) -> str:
    """The `Inference.identity` of the predictor that was exported into `folder`, from its file alone."""
    return f"{workdir.read_json(folder / MANIFEST)['identity']}, exported"


class ExportedPredictor(Inference):
    """A predictor that was exported, on one device; used as a `Predictor`, with the same predictions.

    Args:
      folder: what `python -m launch.convert --to_stablehlo` wrote.

    Raises:
      InputError: it is no such folder, is damaged, or was not exported for this machine's kind of device.
    """

    def __init__(self, folder: Path) -> None:
        if not is_export(folder):
            raise InputError(
                f"{folder} holds no {MANIFEST}, so it is no exported predictor. Write one with python -m launch.convert --workdir=RUN "
                f"--to_stablehlo={folder}, or load a run with datamux_jax.load."
            )
        manifest = workdir.read_json(folder / MANIFEST)
        if manifest["version"] != VERSION:
            raise InputError(
                f"{folder} has version {manifest['version']} of exports, but this release reads {VERSION}. Export the run again."
            )
        here = jax_export.default_export_platform()
        if here not in manifest["platforms"]:
            raise InputError(
                f"{folder} was exported for {', '.join(manifest['platforms'])}, but jax uses {here} here. Export the run again with "
                f"--platforms={here}, or set JAX_PLATFORMS to one of them."
            )
        self.path = folder
        super().__init__(
            Format.load(folder),
            manifest["objective"],
            instances=manifest["num_instances"],
            groups=manifest["groups"],
            cut=manifest["cut"],
            identity=identity(folder),
        )
        self.lengths = tuple(manifest["lengths"])
        try:
            with np.load(folder / PARAMS, allow_pickle=False) as params:
                self._params = jax.device_put({name: params[name] for name in params.files})
            # Compiled once for each length, at its first use.
            self._programs = {
                length: jax.jit(jax_export.deserialize(bytearray((folder / program_file(length)).read_bytes())).call)
                for length in self.lengths
            }
        except Exception as error:  # Of a damaged file, the libraries below jax raise errors of many kinds.
            raise InputError(f"{folder} cannot be read: {error}. Export the run again with this version of jax.") from error

    def dispatch(self, inputs: np.ndarray, mask: np.ndarray) -> Any:
        return self._programs[inputs.shape[2]](self._params, inputs, mask)


def load_exported(path: str | Path) -> ExportedPredictor:
    """Loads what `python -m launch.convert --workdir=RUN --to_stablehlo=DIR` wrote into `path`; see `ExportedPredictor`."""
    return ExportedPredictor(Path(path))
