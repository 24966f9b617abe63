"""Using a trained run: `predictor = datamux_jax.load(RUN)`, `predictor(["guten Morgen", ...])`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datamux_jax import saved, sharding
from datamux_jax.data import pipeline
from datamux_jax.data.formats import Arrays
from datamux_jax.errors import InputError
from datamux_jax.inference import OBJECTIVES, Inference, Prediction
from datamux_jax.model import Network, call
from datamux_jax.runs import Run, load_run

__all__ = ["Prediction", "Predictor", "load"]


class Predictor(Inference):
    """The classifier, tagger or regression of a run, on all devices of this machine; see `Inference`."""

    def __init__(self, run: Run) -> None:
        objective = run.config.objective
        if objective not in OBJECTIVES:
            raise InputError(
                f"{run.path} is a run with objective = {objective!r}: its classifier was never trained. Load a run with "
                f"objective = {' or '.join(map(repr, OBJECTIVES))}, which may start from this one through init_from."
            )
        groups = sharding.eval_groups(run.config, run.mesh)
        identity = saved.identity(run.path, run.config, run.step)
        super().__init__(
            run.format, objective, instances=run.config.num_instances, groups=groups, cut=run.model.cut, identity=identity
        )
        self.run = run
        self.forward = forward(run.model, objective)

    def dispatch(self, inputs: np.ndarray, mask: np.ndarray) -> jax.Array:
        return self.forward(self.run.params, sharding.put_batch({"inputs": inputs, "mask": mask}, self.run.mesh))

    def batches(self, arrays: Arrays, *, shuffle: bool = False) -> Iterator[tuple[np.ndarray, Any]]:
        """Row numbers `[B, N]` and batches on the mesh, of full length, for encoded inputs."""
        batches = pipeline.eval_batches(arrays, groups=self.groups, instances=self.instances, seed=0, shuffle=shuffle)
        for rows, batch in batches:
            yield rows, sharding.put_batch(batch, self.run.mesh)


def forward(model: Network, objective: str) -> Any:
    """The jitted function `(params, batch) -> logits` of prediction, see `task_logits`."""
    return jax.jit(lambda params, batch: task_logits(model, objective, params, batch["inputs"], batch["mask"]))


def task_logits(model: Network, objective: str, params: Any, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, N, C]`; of tagging, `[B, N, L, C]`."""
    h = call(model, params, "encode", inputs, mask)
    return call(model, params, "tag", h) if objective == "tagging" else call(model, params, "classify", h, mask)


def load(path: str | Path) -> Predictor:
    """Loads the run in the folder `path` for prediction.

    Raises:
      InputError: no such run, no checkpoint yet, or a run without a trained classifier.
    """
    return Predictor(load_run(path))
