"""Mixed and demultiplexed states in the plane: the first two principal components."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datamux_jax import sharding
from datamux_jax.analysis.companions import mixtures
from datamux_jax.analysis.parts import check_part, rotations
from datamux_jax.analysis.readings import Reading, reader
from datamux_jax.data.formats import Arrays
from datamux_jax.losses import NO_LABEL
from datamux_jax.progress import Progress
from datamux_jax.runs import Run


class Points(NamedTuple):
    """States on their first two principal components.

    Attributes:
      xy: `[n, 2]`.
      share: of the variance that each of the two components has.
      slot: of each demultiplexed state, `[n]`; of mixed states, which belong to all slots, None.
      mark: class, number, tag or token that a state stands for, `[n]`; of mixed states, of the instance in each slot, `[n, N]`,
        `NO_LABEL` where one has nothing there.
      between_slots: share of the variance of all dimensions that lies between the means of slots, see `between`; None of mixed states.
      between_marks: likewise of classes, tags or tokens; of mixed states, mean over slots; None of numbers.
    """

    xy: np.ndarray
    share: tuple[float, float]
    slot: np.ndarray | None
    mark: np.ndarray
    between_slots: float | None
    between_marks: float | None


def projection(run: Run, arrays: Arrays, *, label: str = "projection") -> tuple[Points, Points]:
    """Principal components of mixed and of demultiplexed states, each of its own.

    Every example stands once in every slot. Where every token has a state, one position of each group is drawn.

    Args:
      run: a loaded run with N > 1.
      arrays: examples, as `examples_of` gives them; at least N.
      label: of the progress line.

    Returns:
      Points of mixed states, one a group, and of demultiplexed states, N a group (fewer where a text has no such position).

    Raises:
      InputError: N = 1, or too few examples.
    """
    check_part(run, "projection", arrays)
    examples, instances = len(arrays["inputs"]), run.config.num_instances
    rng = np.random.default_rng(0)
    order = rotations(examples, instances, rng)
    groups = sharding.eval_groups(run.config, run.mesh)
    progress = Progress(label, -(-examples // groups))
    drawn = []
    for number, found in enumerate(mixtures(run, reader(run), arrays, order, groups)):
        drawn.append(_drawn(found, rng))
        progress.update(number + 1)
    progress.close()
    mixed, states, there, mark = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    mark = np.where(there, mark, NO_LABEL)
    slot = np.broadcast_to(np.arange(instances), there.shape)[there]
    rows = there.all(-1)  # Of a mixed state every instance should have something at the position.
    if not rows.any():
        rows = there.any(-1)
    classes = run.config.objective != "regression"
    columns = [(mixed[one], column[one]) for column in mark.T if (one := rows & (column != NO_LABEL)).any()] if classes else []
    sides = [share for states_nxD, column in columns if (share := between(states_nxD, column)) is not None]
    return (
        Points(*components(mixed[rows]), None, mark[rows], None, float(np.mean(sides)) if sides else None),
        Points(
            *components(states[there]),
            slot,
            mark[there],
            between(states[there], slot),
            between(states[there], mark[there]) if classes else None,
        ),
    )


def _drawn(found: Reading, rng: np.random.Generator) -> tuple[Any, ...]:
    """One position of each group: mixed states `[B, D]`, states `[B, N, D]`, which are there and marks, `[B, N]`; without fillers.

    Drawn are positions where all instances have something to predict or, if there is none, where most have.
    """
    instances = found.weight.sum(1)  # [B, P]
    position = (instances + rng.random(instances.shape) * 0.5).argmax(-1)
    group = np.arange(len(position))
    kept = instances.max(-1) > 0
    there = found.weight[group, :, position] > 0
    parts = found.mixed[group, position], found.states[group, :, position], there, found.mark[group, :, position]
    return tuple(part[kept] for part in parts)


def components(x_nxD: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Coordinates `[n, 2]` on the first two principal components, and the shares of the variance that they have.

    The sign of a component is chosen so that its largest weight is positive: the same states give the same picture.
    """
    centred = x_nxD.astype(np.float64) - x_nxD.mean(0, dtype=np.float64)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes, lengths = (np.concatenate([x, np.zeros((2, *x.shape[1:]))])[:2] for x in (axes, np.square(lengths)))
    largest = axes[np.arange(2), np.abs(axes).argmax(1)]
    whole = max(float(np.square(centred).sum()), 1e-300)
    return centred @ (axes * np.where(largest < 0, -1, 1)[:, None]).T, (float(lengths[0] / whole), float(lengths[1] / whole))


def between(x_nxD: np.ndarray, group_n: np.ndarray) -> float | None:
    """Share of the variance of `x` that lies between the means of groups: 1 where members are equal, 0 on average for random groups.

    This is the adjusted R squared, since many small groups share variance by chance alone. None where every state is a group.
    """
    centred = x_nxD.astype(np.float64) - x_nxD.mean(0, dtype=np.float64)
    _, number, count = np.unique(group_n, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), centred.shape[1]))
    np.add.at(sums, number, centred)
    if len(count) == len(centred):
        return None
    inside = 1 - float((np.square(sums) / count[:, None]).sum() / max(float(np.square(centred).sum()), 1e-300))
    return 1 - inside * (len(centred) - 1) / (len(centred) - len(count))
