"""Using a trained run: `predictor = datamux_jax.load(RUN)`, `predictor(["guten Morgen", ...])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from datamux_jax import sharding
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError
from datamux_jax.model import call
from datamux_jax.runs import Run, load_run


class Prediction(NamedTuple):
    """The most probable label, its probability, and the probabilities of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictor:
    """Classifies any number of inputs, `N` of them in one row, in one compiled shape.

    Who is mixed with whom follows the order of the inputs: input `i` sits in slot `i % N`. A ragged tail is filled up with copies
    of other inputs, whose predictions are dropped.
    """

    def __init__(self, run: Run) -> None:
        if run.config.objective != "classification":
            raise InputError(
                f"{run.path} is a run with objective = {run.config.objective!r}: its classifier was never trained. Load a run with "
                "objective = 'classification', which may start from this one through init_from."
            )
        self.run = run
        model = run.model

        def forward(params: Any, batch: Any) -> jax.Array:
            h = call(model, params, "encode", batch["inputs"], batch["mask"])
            return jax.nn.softmax(call(model, params, "classify", h, batch["mask"]))

        self.forward = jax.jit(forward)
        # Every device takes the same number of groups.
        self.groups = -(-run.config.eval.batch_groups // run.mesh.size) * run.mesh.size

    @property
    def batch_size(self) -> int:
        """Inputs that one call of the compiled function takes."""
        return self.groups * self.run.config.num_instances

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of `probabilities`."""
        return self.run.format.label_names

    def batches(self, arrays: pipeline.Arrays, *, shuffle: bool = False) -> Iterator[tuple[np.ndarray, Any]]:
        """Row numbers `[B, N]` and batches on the mesh, for encoded inputs."""
        batches = pipeline.eval_batches(
            arrays, groups=self.groups, instances=self.run.config.num_instances, seed=0, shuffle=shuffle
        )
        for rows, batch in batches:
            yield rows, sharding.put_batch(batch, self.run.mesh)

    def probabilities(self, inputs: Sequence[str] | np.ndarray) -> np.ndarray:
        """Class probabilities `[n, C]` of texts, or of features `[n, L, F]`, in input order.

        Raises:
          InputError: the inputs are not what the model reads.
        """
        if isinstance(inputs, list | tuple | np.ndarray) and np.shape(inputs)[:1] == (0,):
            return np.zeros((0, len(self.labels)), np.float32)
        arrays = self.run.format.encode(inputs)
        parts = [self.forward(self.run.params, batch) for _, batch in self.batches(arrays)]
        return np.concatenate([np.asarray(part).reshape(-1, len(self.labels)) for part in parts])[: len(inputs)]

    def __call__(self, inputs: Sequence[str] | np.ndarray) -> list[Prediction]:
        """Labels with probabilities, in input order; arguments and errors as `probabilities`."""
        rows = self.probabilities(inputs)
        best = rows.argmax(-1)
        return [
            Prediction(self.labels[b], float(row[b]), {name: float(p) for name, p in zip(self.labels, row, strict=True)})
            for row, b in zip(rows, best, strict=True)
        ]


def load(path: str | Path) -> Predictor:
    """Loads the run in the folder `path` for prediction.

    Raises:
      InputError: no such run, no checkpoint yet, or a run without a trained classifier.
    """
    return Predictor(load_run(path))
