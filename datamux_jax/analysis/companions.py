"""Interference: one instance stays in its slot, its companions are drawn anew, and what comes out for it is compared."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from datamux_jax import sharding
from datamux_jax.analysis.parts import check_part, rotations
from datamux_jax.analysis.readings import Reading, reader
from datamux_jax.data.pipeline import Arrays, eval_batches
from datamux_jax.errors import InputError
from datamux_jax.progress import Progress
from datamux_jax.runs import Run

POSITIONS = 16  # Of rows of tokens, at which states are compared: those of all positions would not fit into memory.


def interference(run: Run, arrays: Arrays, *, companions: int = 10, label: str = "interference") -> dict[str, Any]:
    """How much of what comes out for an instance depends on who it is mixed with.

    Every example stands in every slot with `companions` random sets of other examples. States of sequences are those that the
    task's head reads; of tokens, those of all tokens that something is predicted for.

    Args:
      run: a loaded run with N > 1.
      arrays: examples, as `examples_of` gives them; at least N.
      companions: `K`, sets of companions of each example in each slot; at least 2.
      label: of the progress line.

    Returns:
      Each as a mean over slots and, as `NAME_per_slot`, in every slot:
      `similarity`: cosine between the demultiplexed states of one instance with different companions, mean over all pairs of draws.
      `chance`: the same between different instances (in the same slot; of tokens, at the same position).
      Of rows of tokens these two are read at 16 positions, evenly spread from the first to the last.
      For classes, tags and tokens: `changed`, share of draws whose prediction is not the one that most draws give; `accuracy` and
      `accuracy_std`, over draws (population).
      For numbers: `spread`, standard deviation of the prediction over draws (root mean square); `squared_error` and
      `squared_error_std`, over draws.
      And `examples`, `companions`. None where nothing was predicted.

    Raises:
      InputError: N = 1, too few examples, or fewer than 2 sets of companions.
    """
    check_part(run, "interference", arrays)
    if companions < 2:
        raise InputError(f"companions = {companions} leaves nothing to compare. Ask for at least 2.")
    examples, instances = len(arrays["inputs"]), run.config.num_instances
    read, groups = reader(run), sharding.eval_groups(run.config, run.mesh)
    batches = -(-examples // groups)
    progress = Progress(label, companions * batches)
    total: np.ndarray | None = None  # Sums of unit vectors over draws: their lengths tell the mean cosine of all pairs.
    places = np.zeros(0, int)
    weight = truth = np.zeros(0)
    guesses = []
    for draw in range(companions):
        order = rotations(examples, instances, np.random.default_rng(draw))
        drawn = []
        for number, found in enumerate(mixtures(run, read, arrays, order, groups)):
            rows = order[number * groups : (number + 1) * groups]
            if total is None:
                places = np.linspace(0, found.states.shape[2] - 1, min(POSITIONS, found.states.shape[2])).round().astype(int)
                total = np.zeros((examples, instances, len(places), found.states.shape[-1]), np.float32)
            states = found.states[: len(rows), :, places]
            units = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
            at = rows, np.arange(instances)
            total[at] += units * found.weight[: len(rows), :, places, None]
            drawn.append((rows, *(np.asarray(x)[: len(rows)] for x in (found.guess, found.truth, found.weight))))
            progress.update(draw * batches + number + 1)
        guess, truth, weight = _in_order(drawn, examples)
        guesses.append(guess)
    progress.close()
    assert total is not None
    result = _similarities(total, weight[..., places], companions) | _predictions(
        np.stack(guesses), truth, weight, run.config.objective != "regression"
    )
    return {"examples": examples, "companions": companions, **result}


def mixtures(run: Run, read: Any, arrays: Arrays, order: np.ndarray, groups: int) -> Any:
    """Readings, as numpy arrays, of the groups whose row numbers are `order` `[groups in all, N]`, a batch of `groups` at a time.

    Fillers of the last batch come behind the groups of `order`, with weight 0.
    """
    arranged = {name: array[order.ravel()] for name, array in arrays.items()}
    for _, batch in eval_batches(arranged, groups=groups, instances=order.shape[1], seed=0, shuffle=False):
        with sharding.on_mesh(run.mesh):
            found = read(run.params, sharding.put_batch(batch, run.mesh))
        yield Reading(*jax.device_get(found))


def _in_order(drawn: list[tuple[np.ndarray, ...]], examples: int) -> list[np.ndarray]:
    """Arrays `[groups, N, P]` of all batches to `[examples, N, P]`, by example and slot."""
    rows, *arrays = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    ordered = [np.empty((examples, *array.shape[1:]), array.dtype) for array in arrays]
    for target, array in zip(ordered, arrays, strict=True):
        target[rows, np.arange(rows.shape[1])] = array
    return ordered


def _similarities(total_MxNxPxD: np.ndarray, weight_MxNxP: np.ndarray, draws: int) -> dict[str, Any]:
    """Mean cosines of pairs, from sums of unit vectors: `|sum|^2` is the sum over all pairs, those of a vector with itself included."""
    squares = np.einsum("mnpd,mnpd->mnp", total_MxNxPxD, total_MxNxPxD, dtype=np.float64)
    own = (squares - draws * weight_MxNxP) / (draws * (draws - 1))
    together = np.square(total_MxNxPxD.sum(0, dtype=np.float64)).sum(-1)  # [N, P]
    count = weight_MxNxP.sum(0)
    others = (together - squares.sum(0)).sum(-1), draws**2 * (count * (count - 1)).sum(-1)
    return _named("similarity", own.sum((0, 2)), weight_MxNxP.sum((0, 2))) | _named("chance", *others)


def _predictions(guesses: np.ndarray, truth: np.ndarray, weight: np.ndarray, classes: bool) -> dict[str, Any]:
    """What predictions `[K, M, N, P]` say of truths `[M, N, P]`."""
    name, score = ("accuracy", guesses == truth) if classes else ("squared_error", np.square(guesses - truth))
    scores = [(one * weight).sum((0, 2)) for one in score]  # Of each draw, by slot.
    count = weight.sum((0, 2))
    if classes:
        votes = np.max([(guesses == one).sum(0) for one in guesses], axis=0)
        first = _named("changed", ((1 - votes / len(guesses)) * weight).sum((0, 2)), count)
    else:
        variance = _named("spread", (guesses.var(0) * weight).sum((0, 2)), count)
        first = {key: _root(value) for key, value in variance.items()}
    means = _named(name, np.mean(scores, axis=0), count)
    deviations = {
        f"{name}_std": _ratio(np.std([one.sum() for one in scores]), count.sum()),
        f"{name}_std_per_slot": [_ratio(*pair) for pair in zip(np.std(scores, axis=0), count, strict=True)],
    }
    return first | means | deviations


def _named(name: str, total_N: np.ndarray, count_N: np.ndarray) -> dict[str, Any]:
    return {
        name: _ratio(total_N.sum(), count_N.sum()),
        f"{name}_per_slot": [_ratio(*pair) for pair in zip(total_N, count_N, strict=True)],
    }


def _ratio(total: Any, count: Any) -> float | None:
    return float(total / count) if count > 0 else None


def _root(value: Any) -> Any:
    return [_root(one) for one in value] if isinstance(value, list) else None if value is None else float(np.sqrt(value))
