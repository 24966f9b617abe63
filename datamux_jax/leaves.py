"""Parameters of a saved run by path, for networks that take some of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax

from datamux_jax import saved, workdir
from datamux_jax.checkpoint import reader


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree by path: `backbone/layers_0/...`."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: Mapping[str, Any]) -> Any:
    """The tree of leaves by path."""
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def shapes(run: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters in the chosen checkpoint of a run, by path.

    Raises:
      InputError: there is none.
    """
    record = saved.record(run, workdir.load_config(run))
    return {path: shape for path, (shape, _) in saved.shapes(record, "params").items()}


def restored(run: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the chosen checkpoint of a run, by path.

    Args:
      run: its folder.
      wanted: path -> a real or abstract leaf of the same shape, whose sharding the restored one gets.

    Raises:
      InputError: no checkpoint is intact.
    """
    # What is not used has a sharding too: the one it was saved with may be of devices that are not there.
    where = next(iter(wanted.values())).sharding
    whole = jax.NamedSharding(where.mesh, jax.P()) if isinstance(where, jax.NamedSharding) else where
    abstract = {
        path: jax.ShapeDtypeStruct(shape, "float32", sharding=wanted[path].sharding if path in wanted else whole)
        for path, shape in shapes(run).items()
    }
    with contextlib.closing(reader(run, workdir.load_config(run))) as source:
        found = flat(source.restore_params(nested(abstract))[1])
    return {path: found[path] for path in wanted}
