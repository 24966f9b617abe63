"""Plans for people, and as JSON. Every number is an estimate, and marked as one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamux_jax import report, sharding, workdir
from datamux_jax.errors import InputError
from datamux_jax.plan_search import Row
from datamux_jax.planner import Estimate
from datamux_jax.topology import Topology

GIB, MIB, TERA = 2**30, 2**20, 1e12
LABEL = 31  # Columns of what a number is.
NO_COMPILER = (
    "libtpu is not installed, so nothing was compiled: below is what shapes and shardings alone tell. Activations, communication and "
    "time are not known. pip install libtpu gives them."
)


def details(row: Row, found: Estimate, topology: Topology, largest: int = 12) -> str:
    """One plan, in full.

    Args:
      row: the plan.
      found: its estimate.
      topology: the machine.
      largest: number of collectives to list.
    """
    config = row.config
    groups = found.instances // config.num_instances
    micro = f" in {config.accumulation} micro-batches" if config.accumulation > 1 else ""
    what = f"{groups} groups of N = {config.num_instances}{micro}, {found.positions} positions; {found.parameters:,} parameters"
    lines = [f"{found.devices} chips ({mesh_text(row, ', ')}); {what}"]
    lines += [f"  {name:<{LABEL}} {size / GIB:8.2f} GiB a chip" for name, size in found.memory.items()]
    if found.capacity:
        verdict = (
            f"fits, {found.left / GIB:.2f} GiB left" if found.left >= 0 else f"does not fit, by {-found.left / GIB:.2f} GiB"
        )
        lines.append(
            f"  {'of':<{LABEL}} {found.capacity / GIB:8.2f} GiB: {verdict}" + ("" if found.compiled else ", activations apart")
        )
    lines.append(f"  {'matrix products':<{LABEL}} {found.flops / TERA:8.3f} TFLOP a chip")
    if found.times:
        lines += _times(found, topology)
    if found.uncounted_loops:
        lines.append(
            f"  {found.uncounted_loops} loop(s) of unknown length count as one pass: operations, time and communication are too low"
        )
    if found.compiled:
        lines.append(f"Collectives of a step ({sum(one.count for one in found.collectives)}), largest first:")
    for one in found.collectives[:largest]:
        first, _, others = one.shape.partition(" ")
        shape = first + (f" and {len(others.split())} more" if others else "")
        among = f" of {one.members}" if one.members else ""
        hidden = ", overlapped" if one.overlapped else ""
        lines.append(f"  {one.count:>4} x {one.kind:<18} {shape:<32} {one.bytes / MIB:9.2f} MiB{among}{hidden}")
    return "\n".join(lines)


def _times(found: Estimate, topology: Topology) -> list[str]:
    times, rate = found.times, found.rate
    assert times is not None
    assert rate is not None
    each = rate / found.devices
    peak = found.flops / topology.chip.flops / times.total
    hidden = f"; {1000 * times.overlapped:.2f} ms more overlapped" if times.overlapped else ""
    parts = [
        ("step (estimate)", times.total, f": {rate:,.0f} instances/s, {each:,.1f} a chip; {peak:.0%} of the peak"),
        ("  computing", times.computing, f", by {times.source}"),
        ("  waiting for other devices", times.waiting, f", by bytes and links{hidden}"),
    ]
    if times.optimal is not None:
        parts.append(("  the compiler's optimum", times.optimal, ", were every operation at peak or memory speed, alone"))
    return [f"  {name:<{LABEL}} {1000 * seconds:8.2f} ms{text}" for name, seconds, text in parts]


def mesh_text(row: Row, between: str = " ") -> str:
    """Axes that are larger than 1; in full where `between` is a comma."""
    shown = {axis: size for axis, size in row.mesh.items() if size != 1 or "," in between}
    equals = " = " if "," in between else "="
    return between.join(f"{axis}{equals}{size}" for axis, size in shown.items()) or "1"


def comparison(rows: Sequence[Row], topology: Topology) -> str:
    """Several plans as one table in Markdown; `vs N = 1` compares instances/s with the plain network on the same mesh, and with N."""
    head = [
        "run",
        "N",
        "groups",
        "mesh",
        "micro",
        "GiB",
        "fits",
        "TFLOP",
        "ms",
        "of it waiting",
        "optimum",
        "instances/s",
        "a chip",
        "vs N = 1",
    ]
    body = [_cells(row, rows, topology) for row in rows]
    if not any(row.run for row in rows):
        head, body = head[1:], [cells[1:] for cells in body]
    problems = [  # What lacks memory says so in its cell.
        f"{row.run or 'run'}, N = {row.config.num_instances}, {mesh_text(row)}: {row.problem}"
        for row in rows
        if row.problem and row.lack is None
    ]
    return "\n".join([*report.table(head, body), *problems])


def _cells(row: Row, rows: Sequence[Row], topology: Topology) -> list[str]:
    config, found = row.config, row.estimate
    cells = [row.run, str(config.num_instances)]
    where = [mesh_text(row), str(config.accumulation)]
    lacking = "no, too large" if row.lack is None else f"no, {row.lack / GIB:.2f} GiB lack"
    if row.refused and row.refused.used is not None:
        return [*cells, "", *where, f"{row.refused.used / GIB:.2f}", lacking, *[""] * 7]
    if found is None:
        return [*cells, "", *where, "", lacking if row.too_large else "no estimate", *[""] * 7]
    cells += [str(found.instances // config.num_instances), *where, f"{found.memory['total'] / GIB:.2f}"]
    fits = "yes" if found.compiled else "not known"
    cells += [fits if row.fits else lacking, f"{found.flops / TERA:.3f}"]
    if found.times is None or found.rate is None:
        return [*cells, *[""] * 6]
    times = found.times
    optimal = "" if times.optimal is None else f"{1000 * times.optimal:.2f}"
    cells += [f"{1000 * times.total:.2f}", f"{1000 * times.waiting:.2f}", optimal]
    return [*cells, f"{found.rate:,.0f}", f"{found.rate / found.devices:,.1f}", _against_plain(row, rows)]


def _against_plain(row: Row, rows: Sequence[Row]) -> str:
    """The rate against the best plain network that learns the same on the same mesh, and fits."""
    rates = [
        one.estimate.rate
        for one in rows
        if one.config.num_instances == 1 and one.mesh == row.mesh and one.config.objective == row.config.objective
        if one.fits and one.estimate and one.estimate.rate
    ]
    if not rates or row.config.num_instances == 1 or not (row.estimate and row.estimate.rate):
        return ""
    ratio = row.estimate.rate / max(rates)
    return f"{ratio:.2f}x = {ratio / row.config.num_instances:.2f} N"


def check_json(path: Path) -> None:
    """Checks, before any work, that a file can be written.

    Raises:
      InputError: it exists already, or its folder does not.
    """
    if path.exists() or not path.parent.is_dir():
        problem = "exists and is not overwritten" if path.exists() else f"cannot be written: {path.parent} is no folder"
        raise InputError(f"--json={path} {problem}. Choose another file.")


def write_json(path: Path, rows: Sequence[Row], topology: Topology, step: str) -> None:
    """Writes plans with all that was estimated, times in seconds and sizes in bytes."""
    workdir.write_json(path, {
        "kind": "estimates of a compiler, nothing measured",
        "topology": topology.name,
        "slices": topology.slices,
        "step": step,
        "versions": {name: _version(name) for name in ("jax", "libtpu")},
        "plans": [_entry(row) for row in rows],
    })  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _entry(row: Row) -> dict[str, Any]:
    config = row.config
    about = {"run": row.run, "num_instances": config.num_instances, "accumulation": config.accumulation, "dtype": config.dtype}
    found = dataclasses.asdict(row.estimate) if row.estimate else None
    if row.estimate and found is not None:
        found["instances_per_second"] = row.estimate.rate
    refused = {"used": row.refused.used, "capacity": row.refused.capacity} if row.refused else None
    about["mesh"] = {axis: row.mesh[axis] for axis in sharding.AXES}
    return {**about, "problem": row.problem, "out_of_memory": refused, "lack": row.lack, "estimate": found}
