"""Many plans: for several N and meshes, or for all meshes that fit a machine, the best first."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datamux_jax import planner, sharding
from datamux_jax.config import with_instances
from datamux_jax.errors import InputError, brief
from datamux_jax.planner import Estimate
from datamux_jax.progress import Progress
from datamux_jax.refusal import OutOfMemory
from datamux_jax.topology import Topology

Estimator = Callable[[Any], Estimate]


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan of several.

    Attributes:
      run: name of the run in its experiment.
      config: that was planned.
      estimate: None if there is none.
      problem: why there is none.
      seconds: that planning took.
      refused: by the compiler, for it needs too much memory.
    """

    run: str
    config: Any
    estimate: Estimate | None
    problem: str = ""
    seconds: float = 0.0
    refused: OutOfMemory | None = None

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: self.config.mesh[axis] for axis in sharding.AXES}

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.left >= 0

    @property
    def too_large(self) -> bool:
        """Whether memory is what it lacks."""
        return self.refused is not None or (self.estimate is not None and self.estimate.left < 0)

    @property
    def lack(self) -> int | None:
        """Bytes that a device lacks; 0 for what fits, None where nothing says."""
        if self.refused:
            return self.refused.lack
        return None if self.estimate is None else max(-self.estimate.left, 0)


def with_mesh(config: Any, mesh: Mapping[str, int], accumulation: int | None = None) -> Any:
    """A copy of a config with another mesh and, if given, another number of micro-batches."""
    config = config.copy_and_resolve_references()
    config.mesh.update(dict(mesh))
    config.accumulation = accumulation or config.accumulation
    return config


def read_counts(text: str) -> list[int]:
    """Reads `1,2,5,10`.

    Raises:
      InputError: it is no list of numbers.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"--n={text} is no list of numbers. Write it like --n=1,2,5,10.")
    return [int(part) for part in text.split(",")]


def read_meshes(text: str) -> list[dict[str, int]]:
    """Reads `data=16,fsdp=16;data=256`: meshes, whose axes are 1 if they are not named, and what is left if they are -1.

    Raises:
      InputError: it is no list of meshes.
    """
    meshes = []
    for part in text.split(";"):
        pairs = [pair.strip().partition("=") for pair in part.split(",")]
        if any(axis not in sharding.AXES or not re.fullmatch(r"-1|\d+", size) for axis, _, size in pairs):
            raise InputError(
                f"--mesh={text} cannot be read at {part!r}. Write meshes like --mesh='data=16,fsdp=16;data=256', with the axes "
                f"{', '.join(sharding.AXES)}."
            )
        meshes.append(dict.fromkeys(sharding.AXES, 1) | {axis: int(size) for axis, _, size in pairs})
    return meshes


def with_counts(runs: Mapping[str, Any], counts: Sequence[int]) -> list[tuple[str, Any]]:
    """Every run, by name, with every N; without a list, as it is."""
    return [(name, config) for name, run in runs.items() for config in [with_instances(run, n) for n in counts] or [run]]


def candidates(
    runs: Mapping[str, Any], counts: Sequence[int], meshes: Sequence[Mapping[str, int]], topology: Topology, step: str
) -> list[tuple[str, Any]]:
    """Every run with every N and every mesh, all checked before the first is compiled; without a list, a run's own.

    Raises:
      InputError: one of them does not fit.
    """
    found = []
    for name, config in with_counts(runs, counts):
        for one in [with_mesh(config, mesh) for mesh in meshes] or [config]:
            planner.check(one, step, topology)
            sizes = planner.mesh_sizes(one, step, topology)  # What -1 stands for.
            found.append((name, with_mesh(one, dict(zip(sharding.AXES, sizes, strict=True)))))
    return found


def searched(runs: Mapping[str, Any], counts: Sequence[int], topology: Topology) -> list[tuple[str, Any]]:
    """Every run with every N, on all meshes that `search` will try, checked before the first is compiled.

    Raises:
      InputError: one of them does not fit, or no mesh divides.
    """
    named = with_counts(runs, counts)
    for _, config in named:
        for mesh in meshes_of(config, topology):
            planner.check(with_mesh(config, mesh, accumulation=1), "train", topology)
    return named


def meshes_of(config: Any, topology: Topology) -> list[dict[str, int]]:
    """All meshes of a machine that divide the sizes of a training step: batch, width (`fsdp`), heads and MLP (`tensor`).

    Raises:
      InputError: there is none.
    """
    model, count = config.model, topology.devices
    found = []
    for tensor in (size for size in range(1, count + 1) if count % size == 0):
        if model.num_heads % tensor or model.mlp_dim % tensor:
            continue
        for fsdp in (size for size in range(1, count // tensor + 1) if (count // tensor) % size == 0):
            data = count // tensor // fsdp
            if model.hidden_size % fsdp == 0 and data % topology.slices == 0 and config.batch_groups % (data * fsdp) == 0:
                found.append({"data": data, "fsdp": fsdp, "tensor": tensor})
    if not found:
        raise InputError(
            f"batch_groups = {config.batch_groups} divides over none of the meshes of {topology}, {count} devices. Choose a multiple "
            f"of {count}."
        )
    return found


def micro_batches(config: Any) -> list[int]:
    """Numbers of micro-batches of a config on its mesh, each twice the one before."""
    shards = config.mesh.data * config.mesh.fsdp
    return [2**power for power in range(20) if config.batch_groups % (shards * 2**power) == 0]


def sweep(chosen: Sequence[tuple[str, Any]], estimator: Estimator, label: str = "plan") -> Iterator[Row]:
    """Plans each of `chosen` in turn, with progress and time left; one that fails is a row too."""
    progress = Progress(label, len(chosen))
    for done, (name, config) in enumerate(chosen, start=1):
        row = attempt(name, config, estimator)
        progress.update(done)
        yield row
    progress.close()


def attempt(name: str, config: Any, estimator: Estimator) -> Row:
    """One row, with an estimate or a problem."""
    began = time.monotonic()
    try:
        return Row(name, config, estimator(config), seconds=time.monotonic() - began)
    except Exception as error:  # A compiler fails in many ways, and the next candidate may do.
        problem = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {brief(error)}"
        refused = error if isinstance(error, OutOfMemory) else None
        return Row(name, config, None, problem, time.monotonic() - began, refused)


def search(name: str, config: Any, topology: Topology, estimator: Estimator) -> Iterator[Row]:
    """Tries all meshes that divide, and on each more micro-batches for as long as fewer need too much memory.

    Raises:
      InputError: no mesh divides.
    """
    meshes = meshes_of(config, topology)
    progress = Progress(f"{name or 'search'}, N = {config.num_instances}", len(meshes))
    for done, mesh in enumerate(meshes, start=1):
        for accumulation in micro_batches(with_mesh(config, mesh)):
            row = attempt(name, with_mesh(config, mesh, accumulation), estimator)
            yield row
            if not row.too_large:  # It fits, or fails for a reason that smaller batches share.
                break
        progress.update(done)
    progress.close()


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Those that fit, most instances a second first; then those too large, closest first; then those of which nothing is known."""

    def key(row: Row) -> tuple[int, float]:
        if row.estimate is not None and row.fits:
            return 0, -(row.estimate.rate or 0.0)
        if row.lack is not None:
            return 1, row.lack
        return (2 if row.too_large else 3), 0.0

    return sorted(rows, key=key)


def check_any(rows: Sequence[Row]) -> None:
    """Raises InputError if no plan tells anything: each failed, and not for the size of its memory."""
    if all(row.estimate is None and not row.too_large for row in rows):
        raise InputError(f"None of {len(rows)} plans could be made. The first: {rows[0].problem}")
