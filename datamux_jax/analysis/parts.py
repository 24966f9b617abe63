"""The parts of an analysis, and which of them a run has nothing to say about."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from datamux_jax import metrics, scoring
from datamux_jax.data.formats import Arrays
from datamux_jax.errors import InputError
from datamux_jax.model import MultiplexedTransformer
from datamux_jax.progress import Progress
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
    reasons: dict[str, str] = {}
    if run.config.num_instances == 1:
        alone = "A run with N = 1 has one instance in each row: it has no companions, and there is nothing to tell apart."
        return reasons | {part: alone for part in PARTS if part != "layers"}
    if not (isinstance(run.model, MultiplexedTransformer) and run.model.vocabulary_head):
        reasons["retrieval"] = (
            "This network has no vocabulary head: it reads features, not tokens, so no token can be read back."
        )
    return reasons


def check_part(run: Run, part: str, arrays: Arrays) -> None:
    """Checks that `part` can be computed from the given examples.

    Raises:
      InputError: it has no meaning for `run`, or there are too few examples.
    """
    if part in left_out(run):
        raise _without(run, part)
    check_examples(run, len(arrays["inputs"]), [part])


def least_examples(instances: int, parts: Collection[str] = PARTS) -> int:
    """How many examples the parts need: two, a group, and for interference enough that companions differ from draw to draw."""
    return max(instances * (2 if "interference" in parts else 1), 2)


def check_examples(run: Run, count: int, parts: Collection[str] = PARTS) -> None:
    """Raises InputError unless there are `least_examples`."""
    instances = run.config.num_instances
    if count < (least := least_examples(instances, parts)):
        raise InputError(
            f"There are {count} examples, but an analysis of N = {instances} instances compares different ones in a group, with "
            f"different companions, and needs at least {least}. Raise examples, or choose a larger split."
        )


def totals_of(step: scoring.Step, run: Run, arrays: Arrays, groupings: int, label: str) -> metrics.Totals:
    """The sums of `step` over all examples in each of `groupings` random groupings; grouping `g` is drawn with the seed `g`."""
    progress = Progress(label, groupings)
    totals: metrics.Totals = {}
    for seed in range(groupings):
        totals = metrics.merge([totals, scoring.score(step, run.params, arrays, run.config, run.mesh, seed=seed).totals])
        progress.update(seed + 1)
    progress.close()
    return totals


def rotations(examples: int, instances: int, rng: np.random.Generator) -> np.ndarray:
    """Random groups in which every example stands once in every slot, and never beside itself: row numbers `[examples, N]`.

    The examples in a random order, moved on by another random number for each slot: the companions of any example in any slot are
    a random set of the others. Of N examples it would always be all of the others; of 2N there are many sets.
    """
    order = rng.permutation(examples)
    shifts = rng.choice(examples, instances, replace=False)
    return order[(np.arange(examples)[:, None] + shifts) % examples]


def _without(run: Run, part: str) -> InputError:
    return InputError(
        f"analysis of {run.path}, {PARTS[part].lower()}: {left_out(run)[part]} Leave this part out, or name another run."
    )
