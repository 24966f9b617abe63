"""The mesh, and how logical axes map to it. One device is a mesh of one; the code path is the same."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from datamux_jax.errors import InputError

# First match wins. Wide axes split over `tensor`, the model width over `fsdp`; what is not named is replicated.
RULES: tuple[tuple[str, str | None], ...] = (
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("embed", "fsdp"),
    ("norm", None),
    ("instances", None),
)
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
AXIS_TYPES = (AxisType.Auto,) * 3


def make_mesh(config: Any, groups: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The device mesh `(data, fsdp, tensor)` of `config.mesh`; -1 for one axis: whatever devices are left.

    Args:
      config: a complete config.
      groups: of one global batch; must divide over `data * fsdp`, and so must its micro-batches.
      devices: default: all of this run; a planner passes those of a machine that is not there.

    Raises:
      InputError: as `mesh_sizes`; or `data` does not divide over the slices of a TPU.
    """
    devices = list(jax.devices() if devices is None else devices)
    return _mesh(mesh_sizes(config, groups, len(devices)), devices)


def mesh_sizes(config: Any, groups: int, count: int) -> tuple[int, ...]:
    """Sizes of the axes of `config.mesh` on `count` devices; arguments as of `make_mesh`.

    Raises:
      InputError: the axes do not multiply to the number of devices, or `groups` does not divide.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if len(free) > 1 or min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != count:
        asked = ", ".join(f"mesh.{axis} = {config.mesh[axis]}" for axis in sizes)
        raise InputError(
            f"{asked} does not cover the {count} devices of this machine exactly. Choose axes whose product is {count}; "
            "one of them may be -1 and takes what is left."
        )
    shards = sizes["data"] * sizes["fsdp"]
    if groups % (shards * config.accumulation):
        micro = f", in accumulation = {config.accumulation} micro-batches," if config.accumulation > 1 else ""
        raise InputError(
            f"A batch of {groups} groups{micro} does not divide over data x fsdp = {shards} devices. Choose a multiple of "
            f"{shards * config.accumulation}."
        )
    return tuple(sizes.values())


def _mesh(sizes: tuple[int, ...], devices: list[Any]) -> Mesh:
    """A mesh whose neighbours are neighbours in the machine, where it has wires; TPU slices, which have none, lie along `data`."""
    slices = len({device.slice_index for device in devices}) if hasattr(devices[0], "slice_index") else 1
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise InputError(
            f"mesh.data = {sizes[0]} does not divide over {slices} slices. Slices are connected by a slow network, which only the axis "
            f"data crosses: make it a multiple of {slices}."
        )
    else:
        inside = (sizes[0] // slices, *sizes[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=AXIS_TYPES)


def abstract_mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    """A mesh without devices, to reckon what each would hold."""
    return AbstractMesh(sizes, AXES, axis_types=AXIS_TYPES)


def inference_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (default: of this run) along `data`: parameters replicated, groups split."""
    devices = list(jax.devices() if devices is None else devices)
    return _mesh((len(devices), 1, 1), devices)


def _shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def eval_groups(config: Any, mesh: Mesh) -> int:
    """Groups of a batch of evaluation and prediction: `eval.batch_groups`, rounded up so that every shard has the same number."""
    shards = _shards(mesh)
    return -(-config.eval.batch_groups // shards) * shards


def unbox(tree: Any) -> Any:
    """Takes the logical-axis boxes off a parameter tree."""
    return nn.unbox(tree)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a (boxed, abstract) tree: `RULES` for what has logical axes, everything else replicated.

    An axis that its mesh axis does not divide is not split (a vocabulary of 50,265 over 8 devices); `not_split` lists them.
    """
    asked = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)

    def fitting(leaf: Any, where: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axis if fits else None for axis, fits in _axes(leaf, where))))

    return jax.tree.map(fitting, unbox(boxed), asked)


def not_split(boxed: Any, mesh: Mesh) -> list[str]:
    """The parameters of a (boxed, abstract) tree with an axis that the rules would split, but that does not divide."""
    asked = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    leaves, places = (jax.tree_util.tree_leaves_with_path(tree) for tree in (unbox(boxed), asked))
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)} over {axis} = {mesh.shape[axis]}"
        for (path, leaf), (_, where) in zip(leaves, places, strict=True)
        for axis, fits in _axes(leaf, where)
        if not fits
    ]


def _axes(leaf: Any, where: NamedSharding) -> list[tuple[Any, bool]]:
    """The mesh axis of each axis of `leaf`, and whether it divides."""
    return [
        (axis, axis is None or size % where.mesh.shape[axis] == 0) for size, axis in zip(leaf.shape, where.spec, strict=False)
    ]


def constrain(x: jax.Array, last: str | None = None) -> jax.Array:
    """Keeps activations where their groups are: `[B, ...]` split by groups and, if `last` is given, the last axis over `tensor`.

    Without it the compiler may move activations to the parameters, which are split over `fsdp` too, instead of parameters to the
    activations. Does nothing outside of `on_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    groups = BATCH_AXES if x.shape[0] % _shards(mesh) == 0 else None
    end = last if last and x.shape[-1] % mesh.shape[last] == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(groups, *[None] * (x.ndim - 2), end))


def held(groups: int) -> int:
    """How many of `groups` a device holds: what is traced is meant for `on_mesh`, or for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else _shards(mesh)
    return groups // shards if groups % shards == 0 else groups


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """While active, what is traced is meant for `mesh`: `constrain` holds."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Groups, the leading axis of every batch array, split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Micro-batches `[k, groups, ...]`: each is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@functools.lru_cache(maxsize=8)  # Asked for with every batch.
def local_groups(mesh: Mesh, groups: int) -> np.ndarray:
    """Which of the `groups` of a global batch the devices of this process hold, ascending: the rows that it must read."""
    places = batch_sharding(mesh).addressable_devices_indices_map((groups,)).values()
    return np.unique(np.concatenate([np.arange(groups)[index] for index in places]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, groups: int | None = None) -> dict[str, jax.Array]:
    """Makes a global batch on the mesh from the rows that this process read.

    Args:
      batch: arrays `[rows, ...]`, rows as `local_groups` lists them.
      mesh: the mesh.
      groups: of the global batch; default: as many as there are rows, for one process.
    """
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    assert groups is not None, "several processes hold parts of a batch"
    mine = local_groups(mesh, groups)

    def put(array: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = index[0].indices(groups) if index else (0, groups, 1)
            first = int(np.searchsorted(mine, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((groups, *array.shape[1:]), where, piece)

    return {name: put(array) for name, array in batch.items()}


def fetch_batch(array: jax.Array) -> np.ndarray:
    """The rows of a global array `[groups, ...]` that lie on the devices of this process, as `local_groups` lists them."""
    shards = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
