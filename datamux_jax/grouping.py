"""Groups of a flat batch; who shares a mixed row in prediction, and how long rows are. Pure numpy.

A mixed row is as long as its longest instance, so inputs of similar length stand together, and rows are cut to the smallest of a
few lengths (buckets) that holds them: few shapes to compile, little padding to compute. Inside of a bucket the order stays: companions
of exactly the same length would save nothing, and interfere more than the lengths of a bucket, on which a network was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from datamux_jax.errors import InputError

SHORTEST = 16  # Shorter rows gain little, and each length is a program to compile.


class Batch(NamedTuple):
    """What one call of the network is fed.

    Attributes:
      rows: row numbers of the inputs, `[B, N]`.
      real: true where the prediction counts, `[B, N]`; elsewhere stands a copy that only fills up.
      length: of the rows.
    """

    rows: np.ndarray
    real: np.ndarray
    length: int


def group(x: Any, instances: int) -> Any:
    """A flat batch `[n, ...]` as groups `[ceil(n / N), N, ...]`: input `i` sits in slot `i % N` of group `i // N`.

    What is missing in the last group are copies of the first inputs, which are mixed like any others; `ungroup` drops their outputs.

    Args:
      x: an array of numpy or JAX, or what numpy makes one of.
      instances: `N`.

    Raises:
      InputError: `N` is below 1, or there is nothing to fill a group with.
    """
    x = x if hasattr(x, "ndim") else np.asarray(x)
    if instances < 1 or not x.ndim or not len(x):
        raise InputError(
            f"An array of shape {list(x.shape)} makes no groups of {instances} instances. Give a flat batch [n, ...] with at least one "
            "input, and at least one instance a group."
        )
    index = np.arange(-(-len(x) // instances) * instances) % len(x)
    return x[index.reshape(-1, instances)]


def ungroup(y: Any, count: int) -> Any:
    """The outputs `[groups, N, ...]` of what `group` made of `count` inputs, as `[count, ...]` in their order.

    Raises:
      InputError: `count` is not the number of inputs that fill so many groups.
    """
    if y.ndim < 2 or not (len(y) - 1) * y.shape[1] < count <= len(y) * y.shape[1]:
        raise InputError(
            f"Outputs of shape {list(y.shape)} are not those of count = {count} inputs. Give the outputs [groups, N, ...] of all "
            "groups, and the length of the flat batch that was grouped."
        )
    return y.reshape(-1, *y.shape[2:])[:count]


def bucket_lengths(length: int) -> tuple[int, ...]:
    """16, 32, 64, ... and `length` itself: the lengths that rows of at most `length` positions are cut to."""
    lengths = []
    size = SHORTEST
    while size < length:
        lengths.append(size)
        size *= 2
    return (*lengths, length)


def check_ensemble(ensemble: int, instances: int) -> None:
    """Raises InputError unless `ensemble` divides the number of instances."""
    if ensemble < 1 or instances % ensemble:
        divisors = ", ".join(str(k) for k in range(1, instances + 1) if instances % k == 0)
        raise InputError(
            f"ensemble = {ensemble} copies of every input are spread over the {instances} slots of this network, so their number "
            f"must divide it. Choose one of: {divisors}."
        )


def batches(sizes: np.ndarray, *, groups: int, instances: int, lengths: tuple[int, ...], ensemble: int = 1) -> Iterator[Batch]:
    """Groups inputs of the same bucket; what comes out depends on the arguments alone.

    The longest come first, so that copies which fill up the last batch are among the cheapest. With a single length the order stays:
    input `i` sits in slot `i % N` of group `i // N`.

    With `ensemble = k` every batch comes `k` times, its inputs in other slots and with other companions (where there are groups
    enough) each time: in time `c` what was in slot `i` of group `b` is in slot `i + c N / k` of group `b + c i`. Copies of one
    input never share a group, unless there are fewer inputs than slots.

    Args:
      sizes: positions that each input needs, `[n]`.
      groups: `B`.
      instances: `N`.
      lengths: to choose row lengths from, ascending; the last one holds everything.
      ensemble: `k`, a divisor of `N`.
    """
    buckets = np.searchsorted(lengths, sizes)
    order = np.argsort(-buckets, kind="stable")
    size = groups * instances
    for start in range(0, len(order), size):
        block = order[start : start + size]
        length = lengths[buckets[block[0]]]
        cells = np.arange(size)
        # Copies of the first group, each in its own slot: of another group, that is, wherever there is more than one. Less than a group
        # is filled with what came before, cut if it is longer.
        pool = block if len(block) >= instances else np.concatenate([block, order[max(start - instances, 0) : start]])
        rows = pool[np.where(cells < len(block), cells, cells % instances % len(pool))].reshape(groups, instances)
        real = (cells < len(block)).reshape(groups, instances)
        filled = -(-len(block) // instances)
        for time in range(ensemble):
            source = moved(groups, instances, filled, time, ensemble)
            yield Batch(rows[source], real[source], length)


def moved(groups: int, instances: int, filled: int, time: int, ensemble: int) -> tuple[np.ndarray, np.ndarray]:
    """Group and slot, both `[B, N]`, where each cell of a batch takes its input from in one of `ensemble` times, see `batches`.

    Only the `filled` first groups exchange.
    """
    group, slot = np.meshgrid(np.arange(groups), np.arange(instances), indexing="ij")
    old_slot = (slot - time * (instances // ensemble)) % instances
    old_group = np.where(group < filled, (group - time * old_slot) % filled, group)
    return old_group, old_slot
