"""A trained run, loaded for use: config, data format, network, parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax

from datamux_jax import checkpoint, optimizer, sharding, workdir
from datamux_jax.build import build_second
from datamux_jax.data.formats import Format
from datamux_jax.model import Network
from datamux_jax.plan import build_model
from datamux_jax.step import placed, state_maker


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that evaluation, prediction and benchmarks need of a run."""

    path: Path
    config: Any
    format: Format
    model: Network
    params: Any
    step: int
    mesh: jax.sharding.Mesh


def load_run(path: str | Path) -> Run:
    """Loads the newest checkpoint (the best, if it keeps the best) of the run in `path`, sharded over this machine's devices.

    Raises:
      InputError: the folder is not a run, holds an experiment of several runs, or has no checkpoint yet.
    """
    path = Path(path)
    config = workdir.load_single(path, str(path))
    fmt = Format.load(path)
    model = build_model(config, fmt)
    # The mesh of the machine that uses a run need not be the one that trained it.
    mesh = sharding.inference_mesh()
    make = state_maker(config, fmt, model, optimizer.make(config), build_second(config, model))
    with contextlib.closing(checkpoint.reader(path, config)) as saves:
        step, params = saves.restore_params(placed(jax.eval_shape(make, jax.random.key(0)).params, mesh))
    return Run(path, config, fmt, model, params, step, mesh)
