"""What a training step would need on a machine that is not there: compiled ahead of time for a TPU topology, never run.

The step is built on the path of a real run; data and checkpoints are not needed. Numbers are the compiler's, not measured.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from datamux_jax import sharding
from datamux_jax.config import validate
from datamux_jax.data.pipeline import CORPORA, Format, format_of
from datamux_jax.data.subword_models import TRAINERS
from datamux_jax.data.tokenizers import tokens_behind
from datamux_jax.errors import InputError
from datamux_jax.plan import Plan, assemble

# Memory of a chip in bytes, from Google's documentation of the generations.
CHIP_MEMORY = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication of a compiled step.

    Attributes:
      kind: an entry of `COLLECTIVES`.
      shape: of what arrives on a chip, as the compiler writes it (`f32[768,3072]`); several if they travel together.
      count: how many such operations the program has.
      bytes: of one.
      in_loop: it stands in a loop, and runs as often as that.
    """

    kind: str
    shape: str
    count: int
    bytes: int
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's view of one step on one chip.

    Attributes:
      devices: number of chips.
      memory: bytes a chip needs, by what for, and `total`.
      capacity: bytes that a chip has; None where it is not known.
      flops: floating-point operations a chip.
      seconds: the compiler's own guess of the step time; None if it makes none.
      collectives: communication, largest first.
    """

    devices: int
    memory: dict[str, int]
    capacity: int | None
    flops: float
    seconds: float | None
    collectives: list[Collective]


def topology_devices(topology: str) -> Sequence[Any]:
    """The chips of a TPU topology such as `v5e:16x16`.

    Raises:
      InputError: libtpu is not installed, or does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # Elsewhere than on Google Cloud it would ask for metadata, and wait.
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # Nothing is run: other processes may plan, or train, beside this one.
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # libtpu raises what its C++ raises.
        missing = "libtpu" in str(error).lower() and "not" in str(error).lower()
        problem = "libtpu is not installed" if missing else " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology={topology}: {problem}. Install libtpu (pip install libtpu), and name a topology as GENERATION:AxB[xC], such "
            "as v5e:16x16, v4:4x4x8, v5p:4x4x4 or v6e:8x8."
        ) from error


def plan_for(config: Any, devices: Sequence[Any]) -> Plan:
    """A plan on devices that are not there. Running text need not be there either: a trained vocabulary is as large as asked for.

    Raises:
      InputError: the config does not fit itself, or the devices.
    """
    validate(config)
    mesh = sharding.make_mesh(config, config.batch_groups, devices)
    return assemble(config, _format(config), mesh)


def _format(config: Any) -> Format:
    data = config.data
    if data.source not in CORPORA or data.tokenizer not in TRAINERS:
        return format_of(config)
    tokens, size = tokens_behind(data.vocab_size, config.num_instances, pad=0, cls=1, sep=2, mask=3)
    return Format((), data.length, vocab_size=size if config.demux.name == "index" else data.vocab_size, tokens=tokens)


def estimate(plan: Plan, topology: str = "") -> Estimate:
    """Compiles the training step of a plan for its devices.

    Raises:
      InputError: the compiler refuses it; most often it does not fit into memory.
    """
    lowered = plan.jitted_step().lower(plan.abstract, plan.batch_shapes)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        why = f"it needs {found[1]} of the {found[2]} that a chip has" if found else " ".join(str(error).split())[:300]
        raise InputError(
            f"The step does not compile for {topology or 'these devices'}: {why}. Use more chips, a larger mesh.fsdp or mesh.tensor, "
            "accumulation, remat = 'full', or fewer batch_groups."
        ) from error
    used = compiled.memory_analysis()
    memory = {
        "parameters and optimizer": used.argument_size_in_bytes,
        "activations and temporaries": used.temp_size_in_bytes,
        "outputs": used.output_size_in_bytes - used.alias_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    cost = compiled.cost_analysis() or {}
    seconds = cost.get("optimal_seconds", 0.0)
    return Estimate(
        devices=plan.mesh.size,
        memory=memory,
        capacity=CHIP_MEMORY.get(topology.partition(":")[0]),
        flops=cost.get("flops", 0.0),
        seconds=seconds if seconds > 0 else None,
        collectives=collectives(compiled.as_text()),
    )


def collectives(program: str) -> list[Collective]:
    """The communication in the text of a compiled program, equal operations counted together, largest first."""
    pattern = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    counts: dict[tuple[str, str, bool], int] = {}
    seen: set[str] = set()
    loop_bodies = set(re.findall(r"body=%?([\w.-]+)", program))
    computation = ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = header[1]
        found = pattern.search(line)
        if not found:
            continue
        kind, number = found[2], re.search(r"channel_id=(\d+)", line)
        name = number[1] if number else line
        if computation.startswith("all-reduce-scatter"):  # What TPUs call a reduce-scatter: a sum of which a part is kept.
            kind, name = "reduce-scatter", computation
        if name in seen:  # Overlapped with computation, one operation stands in several places of the program.
            continue
        seen.add(name)
        arrays = [f"{kind}[{dims}]" for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if kind in BYTES]
        if found[3] and kind != "all-reduce":
            # An asynchronous start gives what it takes and what it makes; the larger one is what arrives.
            arrays = [max(arrays, key=shape_bytes)]
        key = (kind, " ".join(sorted(arrays, key=shape_bytes, reverse=True)), computation in loop_bodies)
        counts[key] = counts.get(key, 0) + 1
    found_all = [Collective(kind, shape, count, shape_bytes(shape), loop) for (kind, shape, loop), count in counts.items()]
    return sorted(found_all, key=lambda one: one.count * one.bytes, reverse=True)


def shape_bytes(shape: str) -> int:
    """Bytes of `f32[768,3072]`, or of several such shapes."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES[kind] * math.prod(int(size) for size in dims.split(",") if size) for kind, dims in found)


def table(plan: Plan, found: Estimate, largest: int = 12) -> str:
    """An estimate for people."""
    config = plan.config
    mesh = ", ".join(f"{axis} = {size}" for axis, size in plan.mesh.shape.items())
    lines = [
        f"{found.devices} chips ({mesh}); {config.batch_groups} groups of N = {config.num_instances}, {plan.format.length} positions"
    ]
    lines += [f"  {name:<28} {size / 2**30:8.2f} GiB a chip" for name, size in found.memory.items()]
    if found.capacity:
        left = found.capacity - found.memory["total"]
        verdict = f"fits, {left / 2**30:.2f} GiB left" if left >= 0 else f"does not fit, by {-left / 2**30:.2f} GiB"
        lines.append(f"  {'of':<28} {found.capacity / 2**30:8.2f} GiB: {verdict}")
    lines.append(f"  {'floating-point operations':<28} {found.flops / 1e12:8.2f} TFLOP a chip")
    if found.seconds:
        rate = config.batch_groups * config.num_instances / found.seconds
        lines.append(f"  {'step (compiler estimate)':<28} {1000 * found.seconds:8.1f} ms, {rate:,.0f} instances/s")
    lines.append(f"Collectives of a step ({sum(one.count for one in found.collectives)}), largest first:")
    for one in found.collectives[:largest]:
        loop = ", in a loop" if one.in_loop else ""
        first, _, others = one.shape.partition(" ")
        shape = first + (f" and {len(others.split())} more" if others else "")
        lines.append(f"  {one.count:>4} x {one.kind:<18} {shape:<32} {one.bytes / 2**20:9.2f} MiB{loop}")
    return "\n".join(lines)
