"""A trained run, loaded for use: config, data format, network, parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from datamux_jax import checkpoint, optimizer, sharding, workdir
from datamux_jax.build import build_generator
from datamux_jax.data.pipeline import Format
from datamux_jax.errors import InputError
from datamux_jax.model import MultiplexedTransformer
from datamux_jax.train import FORMAT, build_model, state_maker


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that evaluation, prediction and benchmarks need of a run."""

    path: Path
    config: Any
    format: Format
    model: MultiplexedTransformer
    params: Any
    step: int
    mesh: jax.sharding.Mesh


def load_run(path: str | Path) -> Run:
    """Loads the newest checkpoint of the run in `path`, sharded over this machine's devices.

    Raises:
      InputError: the folder is not a run, holds an experiment of several runs, or has no checkpoint yet.
    """
    path = Path(path)
    config = workdir.load_config(path)
    if config.runs:
        raise InputError(
            f"{path} is an experiment of several runs. Name one of them: {', '.join(str(path / name) for name in config.runs)}."
        )
    saved = checkpoint.run_checkpoints(path)
    fmt = Format.from_json(workdir.read_json(path / FORMAT))
    model = build_model(config, fmt)
    # The mesh of the machine that uses a run need not be the one that trained it.
    mesh = sharding.inference_mesh()
    make = state_maker(config, fmt, model, optimizer.make(config), build_generator(config, model))
    abstract = jax.eval_shape(make, jax.random.key(0)).params
    placed = sharding.shardings(abstract, mesh)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), sharding.unbox(abstract), placed
    )
    return Run(path, config, fmt, model, saved.restore_params(params), saved.latest_step or 0, mesh)
