"""Interference: one instance stays in its slot, its companions are drawn anew, and what comes out for it is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datamux_jax import sharding
from datamux_jax.analysis.parts import check_part, least_examples, rotations
from datamux_jax.analysis.readings import Reading, reader
from datamux_jax.data.formats import Arrays
from datamux_jax.data.pipeline import eval_batches
from datamux_jax.errors import InputError
from datamux_jax.losses import NO_LABEL
from datamux_jax.progress import Progress
from datamux_jax.runs import Run

POSITIONS = 16  # Of rows of tokens, at which states are compared: those of all positions would not fit into memory.


def interference(run: Run, arrays: Arrays, *, companions: int = 10, label: str = "interference") -> dict[str, Any]:
    """How much of what comes out for an instance depends on who it is mixed with.

    Every example stands in every slot with `companions` random sets of other examples. States of sequences are those that the
    task's head reads; of tokens, those of tokens that something is predicted for.

    Args:
      run: a loaded run with N > 1.
      arrays: examples, as `examples_of` gives them; at least 2N.
      companions: `K`, sets of companions of each example in each slot; at least 2.
      label: of the progress line.

    Returns:
      Each as a mean over slots and, as `NAME_per_slot`, in every slot:
      `similarity`: cosine between the demultiplexed states of one instance with different companions, mean over all pairs of draws.
      `chance`: the same between different instances (in the same slot; of tokens, at the same position).
      Of rows of tokens these two are read at 16 positions alone, spread over those where there are tokens (of tagging, labels).
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
                places = spread(run, arrays, found.states.shape[2])
                total = np.zeros((examples, instances, len(places), found.states.shape[-1]), np.float32)
            states = found.states[: len(rows), :, places]
            at = rows, np.arange(instances)
            total[at] += _units(states) * found.weight[: len(rows), :, places, None]
            drawn.append((rows, *(np.asarray(x)[: len(rows)] for x in (found.guess, found.truth, found.weight))))
            progress.update(draw * batches + number + 1)
        guess, truth, weight = _in_order(drawn, examples)
        guesses.append(guess)
    progress.close()
    assert total is not None
    result = _similarities(total, weight[..., places], companions) | _predictions(
        np.stack(guesses), truth, weight, run.config.objective != "regression"
    )
    where = {"positions": places.tolist()} if total.shape[2] > 1 else {}
    return {"examples": examples, "companions": companions, **where, **result}


def interference_of(
    apply: Callable[[np.ndarray], Any], inputs: np.ndarray, *, instances: int, companions: int = 10, groups: int = 32
) -> dict[str, Any]:
    """`interference` of any multiplexed function, such as a module of your own in `Multiplexed`.

    Args:
      apply: takes groups `[B, N, ...]`, returns a vector for each instance, `[B, N, C]`: `jax.jit(lambda x: model.apply(params, x))`.
      inputs: examples `[M, ...]`, at least 2N.
      instances: `N`, at least 2.
      companions: `K`, sets of companions of each example in each slot; at least 2.
      groups: `B` of every call.

    Returns:
      `similarity`, `chance` and, of the largest of the `C` numbers, `changed`, each as a mean and `NAME_per_slot`; see `interference`.

    Raises:
      InputError: fewer than 2 instances or sets of companions, too few examples, no groups, or outputs of another shape.
    """
    inputs = np.asarray(inputs)
    examples = len(inputs) if inputs.ndim else 0
    if min(instances, companions) < 2 or examples < least_examples(instances):
        raise InputError(
            f"instances = {instances}, companions = {companions} and {examples} examples leave nothing to compare. Give 2 or more of "
            "the first two, and at least twice as many examples as instances, so that companions differ."
        )
    if groups < 1:
        raise InputError(f"groups = {groups}, but a call takes at least one group. Give 1 or more.")
    total: np.ndarray | None = None
    guesses: list[np.ndarray] = []
    for draw in range(companions):
        order = rotations(examples, instances, np.random.default_rng(draw))
        parts = []
        for start in range(0, examples, groups):
            rows = order[np.arange(start, start + groups) % examples]  # One shape: the last call begins again.
            out = np.asarray(apply(inputs[rows]), np.float32)
            if out.ndim != 3 or out.shape[:2] != rows.shape:
                raise InputError(
                    f"The function gave shape {list(out.shape)} for inputs {[groups, instances, *inputs.shape[1:]]}, but a "
                    f"vector for each instance is compared, [{groups}, {instances}, C]. Flatten or average what it gives."
                )
            parts.append(out[: examples - start])
        found = np.concatenate(parts)
        total = np.zeros_like(found) if total is None else total
        total[order, np.arange(instances)] += _units(found)
        guesses.append(*_in_order([(order, found.argmax(-1)[..., None])], examples))
    assert total is not None
    ones = np.ones((examples, instances, 1))
    changed = _predictions(np.stack(guesses), guesses[0], ones, True)
    named = {name: changed[name] for name in ("changed", "changed_per_slot")}
    return {"examples": examples, "companions": companions, **_similarities(total[:, :, None], ones, companions), **named}


def spread(run: Run, arrays: Arrays, positions: int) -> np.ndarray:
    """At most `POSITIONS` of the first `positions` ones, as many for each share of all tokens (of tagging, of all labels)."""
    there = arrays["label"] != NO_LABEL if run.config.objective == "tagging" else arrays["mask"] > 0
    if positions == 1 or there.ndim == 1:
        return np.zeros(1, int)
    mass = there[:, :positions].sum(0).cumsum()
    wanted = (np.arange(POSITIONS) + 0.5) / POSITIONS * mass[-1]
    return np.unique(np.searchsorted(mass, wanted))


def mixtures(run: Run, read: Any, arrays: Arrays, order: np.ndarray, groups: int) -> Any:
    """Readings, as numpy arrays, of the groups whose row numbers are `order` `[groups in all, N]`, a batch of `groups` at a time.

    Fillers of the last batch come behind the groups of `order`, with weight 0.
    """
    arranged = {name: array[order.ravel()] for name, array in arrays.items()}
    for _, batch in eval_batches(arranged, groups=groups, instances=order.shape[1], seed=0, shuffle=False):
        with sharding.on_mesh(run.mesh):
            found = read(run.params, sharding.put_batch(batch, run.mesh))
        yield Reading(*jax.device_get(found))


def _units(x: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


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
