"""TPU machines that need not be there: their names, what their chips can do, and the compiler's picture of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datamux_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs. JAX sees a chip as one device.

    Sources: memory, its speed, links, peaks and the network between slices from "How to Scale Your Model"
    (jax-ml.github.io/scaling-book, "TPU specs") and Google's documentation of the generations. The clock is the peak over what the
    matrix units do in a cycle.

    Attributes:
      memory: bytes.
      flops: peak of bfloat16 matrix products, FLOP/s.
      units: FLOP a cycle of all matrix units.
      memory_speed: bytes/s to and from memory.
      link_speed: bytes/s that leave a chip along one axis of the machine, in both directions together.
      slice_speed: bytes/s that leave a chip towards other slices: its share of its host's network.
      axes: of the machine, 2 or 3.
      pod: the largest machine.
      options: for libtpu. Without them it offers the two cores of a v4 by themselves; JAX has them joined.
    """

    memory: int
    flops: float
    units: int
    memory_speed: float
    link_speed: float
    slice_speed: float
    axes: int
    pod: tuple[int, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops / self.units


MXU = 2 * 128 * 128  # FLOP a cycle of one matrix unit; v6e's are 256 wide.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 8 * MXU, 1.2e12, 9e10, 6.25e9, 3, (16, 16, 16), {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * 2**30, 197e12, 4 * MXU, 0.81e12, 9e10, 3.125e9, 2, (16, 16)),
    "v5p": Chip(95 * 2**30, 459e12, 8 * MXU, 2.8e12, 1.8e11, 6.25e9, 3, (16, 20, 28)),
    "v6e": Chip(32 * 2**30, 918e12, 16 * MXU, 1.6e12, 1.8e11, 12.5e9, 2, (16, 16)),
}
# What Google Cloud offers: of two axes these, of three axes these and all whose axes are multiples of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))


# Elsewhere than on Google Cloud libtpu would ask for metadata, wait, and complain. Nothing is run: other processes may plan, or train,
# beside this one.
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class NoCompiler(Exception):
    """libtpu is not installed, so nothing can be compiled for a TPU."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU machine: slices of one shape, whose chips are wired to each other; slices reach each other through their hosts."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def devices(self) -> int:
        """Number of chips, of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def link_speed(self) -> float:
        """Bytes/s that leave a chip along one axis of a slice: in both directions where axes close to rings, else in one.

        Rings need whole axes of the pod where machines have two axes, and whole cubes of 4x4x4 where they have three ("How to Scale
        Your Model", "TPU networking").
        """
        if self.chip.axes == 2:
            rings = all(size == whole for size, whole in zip(self.shape, self.chip.pod, strict=True))
        else:
            rings = all(size % 4 == 0 for size in self.shape)
        return self.chip.link_speed / (1 if rings else 2)

    @property
    def name(self) -> str:
        """`v5e:16x16`."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name + (f", {self.slices} slices" if self.slices > 1 else "")


def parse(text: str, slices: int = 1) -> Topology:
    """Reads `v5e:16x16`, before anything of libtpu is loaded: it ends the process at some impossible names.

    Raises:
      InputError: no such generation, or no machine of that shape.
    """
    generation, _, shape = text.partition(":")
    if generation not in CHIPS:
        raise InputError(
            f"--topology={text} names the generation {generation!r}, which is not planned for. Name a topology as "
            f"GENERATION:AxB[xC], with one of {', '.join(CHIPS)}: v5e:16x16, v4:4x4x8, v5p:4x4x4 or v6e:8x8."
        )
    chip = CHIPS[generation]
    sizes = tuple(int(size) for size in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    ordered = tuple(sorted(sizes))
    offered = ordered in FLAT if chip.axes == 2 else ordered in SMALL or all(size and size % 4 == 0 for size in sizes)
    if len(sizes) != chip.axes or not offered or any(a > b for a, b in zip(ordered, chip.pod, strict=True)):
        few = FLAT if chip.axes == 2 else SMALL
        more = "" if chip.axes == 2 else f", or three multiples of 4 up to {'x'.join(map(str, chip.pod))}"
        known = ", ".join("x".join(map(str, one)) for one in few)
        raise InputError(
            f"--topology={text} is no shape of {generation}, which has {chip.axes} axes. Choose {known}{more}; for more chips, "
            "--slices."
        )
    if slices < 1:
        raise InputError(f"--slices={slices} leaves no machine. Give 1 or more.")
    return Topology(generation, sizes, slices)


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a machine, as the compiler sees them; nothing is run on them.

    Raises:
      NoCompiler: libtpu is not installed.
      InputError: libtpu does not know the topology.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    more = dict(topology.chip.options) | ({"num_slices": topology.slices} if topology.slices > 1 else {})
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **more).devices
    except Exception as error:  # libtpu raises what its C++ raises.
        text = " ".join(str(error).split())
        if "not installed" in text or isinstance(error, ImportError):
            raise NoCompiler(text) from error
        raise InputError(
            f"--topology={topology}: libtpu does not know it ({text[:200]}). Choose another shape, or another version of libtpu."
        ) from error
