"""The mesh, and how logical axes map to it. One device is a mesh of one; the code path is the same."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def make_mesh(config: Any, groups: int) -> Mesh:
    """The device mesh `(data, fsdp, tensor)` of `config.mesh`; -1 for one axis: whatever devices are left.

    Args:
      config: a complete config.
      groups: of one global batch; must divide over `data * fsdp`.

    Raises:
      InputError: the axes do not multiply to the number of devices, or `groups` does not divide.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    devices = jax.device_count()
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    if len(free) > 1 or min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != devices:
        asked = ", ".join(f"mesh.{axis} = {config.mesh[axis]}" for axis in sizes)
        raise InputError(
            f"{asked} does not cover the {devices} devices of this machine exactly. Choose axes whose product is {devices}; "
            "one of them may be -1 and takes what is left."
        )
    shards = sizes["data"] * sizes["fsdp"]
    if groups % shards:
        raise InputError(
            f"A batch of {groups} groups does not divide over data x fsdp = {shards} devices. Choose a multiple of {shards}."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def inference_mesh() -> Mesh:
    """All devices along `data`: parameters replicated, groups split."""
    return jax.make_mesh((jax.device_count(), 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def unbox(tree: Any) -> Any:
    """Takes the logical-axis boxes off a tree's leaves."""
    return nn.unbox(tree)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a tree whose leaves are boxed with logical axis names; unboxed leaves are replicated."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def check_divides(boxed: Any, mesh: Mesh) -> None:
    """Raises InputError if an axis of the boxed, abstract tree does not divide over the mesh axis that it is split on."""

    def check(path: Any, leaf: Any, where: NamedSharding) -> None:
        try:
            where.shard_shape(leaf.shape)
        except ValueError as error:
            sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"The parameter {name} of shape {leaf.shape} does not divide over the mesh "
                f"({sizes}), which splits it as {where.spec}. Change model sizes, or the mesh."
            ) from error

    jax.tree_util.tree_map_with_path(check, unbox(boxed), shardings(boxed, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Groups, the leading axis of every batch array, split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes a global batch on the mesh from each host's own rows."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
