"""The parts of an analysis, and which of them a run has nothing to say about."""

from __future__ import annotations

import numpy as np

from datamux_jax.data.pipeline import Arrays
from datamux_jax.errors import InputError
from datamux_jax.runs import Run

# Part -> its heading in reports.
PARTS = {
    "layers": "Layers",
    "interference": "Interference",
    "retrieval": "Retrieval by slot and position",
    "projection": "Projection",
}


def left_out(run: Run) -> dict[str, str]:
    """Part -> why it has no meaning for `run`, a sentence; only those that have none."""
    if run.config.num_instances == 1:
        reason = "A run with N = 1 mixes nothing: no instance has companions, and nothing is unmixed."
        return {part: reason for part in PARTS if part != "layers"}
    if not run.model.vocabulary_head:
        return {
            "retrieval": "This network has no vocabulary head: it reads features, not tokens, so no token can be read back."
        }
    return {}


def check_part(run: Run, part: str, arrays: Arrays) -> None:
    """Checks that `part` can be computed from the given examples.

    Raises:
      InputError: it has no meaning for `run`, or there are too few examples.
    """
    if reason := left_out(run).get(part):
        raise InputError(f"analysis of {run.path}, {PARTS[part].lower()}: {reason} Leave this part out, or name another run.")
    check_examples(run, len(arrays["inputs"]))


def check_examples(run: Run, count: int) -> None:
    """Raises InputError unless `count` examples fill a group, and are two at least, so that there is something to compare."""
    least = max(run.config.num_instances, 2)
    if count < least:
        raise InputError(
            f"There are {count} examples, but an analysis of N = {run.config.num_instances} instances compares different ones in a "
            f"group and needs at least {least}. Raise examples, or choose a larger split."
        )


def eval_groups(run: Run) -> int:
    """Groups of a batch: every device takes the same number."""
    return -(-run.config.eval.batch_groups // run.mesh.size) * run.mesh.size


def rotations(examples: int, instances: int, rng: np.random.Generator) -> np.ndarray:
    """Random groups in which every example stands once in every slot, and never beside itself: row numbers `[examples, N]`.

    The examples in a random order, moved on by another random number for each slot: the companions of any example in any slot are
    a random set of the others.
    """
    order = rng.permutation(examples)
    shifts = rng.choice(examples, instances, replace=False)
    return order[(np.arange(examples)[:, None] + shifts) % examples]
