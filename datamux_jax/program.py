"""Reading the text of a program that XLA compiled for a TPU: cycles, floating-point operations and communication of one run.

A program is a list of computations. The entry computation, bodies of loops and branches are *steps*: what stands in them runs in
order. Other computations belong to one instruction (a fusion). `times` says how often each computation runs, which the compiler's own
sums do not: they count the body of a loop once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
WORK = ("fusion", "sort", "gather", "scatter", "reduce-window", "dynamic-slice", "dynamic-update-slice", "convolution")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication of a compiled step.

    Attributes:
      kind: an entry of `COLLECTIVES`; with " between slices" what leaves a slice.
      shape: of what arrives on a device (of a reduce-scatter: what is summed), as the compiler writes it (`f32[768,3072]`); several if
        they travel together.
      count: how many such operations a step runs.
      bytes: of one.
      members: devices that take part in one; 0 where the program does not say.
      overlapped: other work runs meanwhile.
    """

    kind: str
    shape: str
    count: int
    bytes: int
    members: int
    overlapped: bool

    def seconds(self, link_speed: float, slice_speed: float) -> float:
        """Time of all of them in a ring along one axis of the machine, latency not counted.

        Every byte of a gathered array but a device's own travels through each link once, those of a sum that all get twice ("How to
        Scale Your Model", section "Sharding").

        Args:
          link_speed: bytes/s along that axis, both directions together.
          slice_speed: bytes/s of a device to other slices.
        """
        if self.kind.endswith("between slices"):
            return self.count * self.bytes / slice_speed
        share = (self.members - 1) / self.members if self.members else 1.0
        return self.count * self.bytes * share * (2 if self.kind == "all-reduce" else 1) / link_speed


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of a compiled program, by computation.

    Attributes:
      computations: name -> its lines.
      entry: name of the one that runs.
    """

    computations: dict[str, list[str]]
    entry: str

    @classmethod
    def read(cls, text: str) -> Program:
        """Splits the text of a compiled program, as XLA writes it."""
        computations: dict[str, list[str]] = {}
        entry = name = ""
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                name = header[2]
                computations[name] = []
                entry = name if header[1] else entry
            elif name:
                computations[name].append(line)
        return cls(computations, entry)

    def times(self) -> tuple[dict[str, int], dict[str, int]]:
        """How often each computation runs in one run of the program: of steps, and of computations that belong to one instruction.

        Branches all count, as if each were taken.
        """
        steps: Counter[str] = Counter()
        parts: Counter[str] = Counter()

        def walk(name: str, count: int, found: Counter[str]) -> None:
            found[name] += count
            for line in self.computations[name]:
                if loop := WHILE.search(line):
                    walk(loop[2], count * (self.trips(loop[1]) or 1), found)
                elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                    for branch in branches[1].split(","):
                        walk(branch.strip().lstrip("%"), count, found)
                elif called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                    walk(called[1], count, found)
                elif part := re.search(r"calls=%?([\w.-]+)", line):
                    walk(part[1], count, parts)

        walk(self.entry, 1, steps)
        return steps, parts

    def trips(self, condition: str) -> int | None:
        """How often a loop with this condition runs, where it counts up to a constant, as all of `jax.lax.scan` do; else None."""
        lines = "\n".join(self.computations[condition])
        compared = re.search(r" compare\(([^)]*)\), direction=LT", lines)
        for operand in compared[1].split(",") if compared else ():
            if bound := re.search(rf"{re.escape(operand.strip())} = s32\[\]\S* constant\((\d+)\)", lines):
                return int(bound[1])
        return None

    def uncounted(self) -> int:
        """Loops of which the program does not say how often they run: everything here counts one pass."""
        loops = WHILE.findall("\n".join(map(self.text, self.computations)))
        return sum(self.trips(condition) is None for condition, _ in loops)

    def cycles(self) -> int:
        """The sum of what the compiler reckons for its instructions (`estimated_cycles`). Communication has no such number."""
        total = 0
        for name, count in self.times()[0].items():
            total += count * sum(int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', self.text(name)))
        return total

    def unpriced_bytes(self) -> int:
        """Bytes of the results of instructions that do work but have no cycles: gathers, scatters, sorts."""
        total = 0
        for name, count in self.times()[0].items():
            for line in self.computations[name]:
                found = INSTRUCTION.match(line)
                if found and found[3] in WORK and not re.search("estimated_cycles|async-collective|all-reduce-scatter", line):
                    total += count * shape_bytes(found[2])
        return total

    def unknown(self) -> int:
        """Instructions of which the compiler's own `optimal_seconds` counts each as -1 second: calls of what XLA cannot look into."""
        return sum(len(re.findall(r" custom-call\(", self.text(name))) for name in self.times()[0])

    def loops(self) -> bool:
        """Whether anything runs more than once."""
        return any(count > 1 for count in self.times()[0].values())

    def text(self, name: str) -> str:
        return "\n".join(self.computations[name])

    def flops(self) -> float:
        """Floating-point operations of all matrix products, two for each multiplication with its addition."""
        steps, parts = self.times()
        counts = Counter(steps) + Counter(parts)
        return sum(count * sum(_products(self.computations[name])) for name, count in counts.items())

    def collectives(self) -> list[Collective]:
        """The communication, equal operations counted together, largest first."""
        steps, parts = self.times()
        counts: Counter[tuple[str, str, int, bool]] = Counter()
        seen: set[str] = set()
        for name, count in [*steps.items(), *parts.items()]:
            for line in self.computations[name]:
                if found := _collective(line, name, name in steps):
                    identity, key = found
                    if identity not in seen:  # Overlapped, one operation stands in several places of the program.
                        counts[key] += count
                    seen.add(identity)
        all_found = [
            Collective(kind, shape, count, shape_bytes(shape), members, overlapped)
            for (kind, shape, members, overlapped), count in counts.items()
        ]
        return sorted(all_found, key=lambda one: one.count * one.bytes, reverse=True)


def shape_bytes(shape: str) -> int:
    """Bytes of `f32[768,3072]`, or of several such shapes."""
    return sum(BYTES[kind] * math.prod(_sizes(dims)) for kind, dims in SHAPE.findall(shape) if kind in BYTES)


def _sizes(dims: str) -> list[int]:
    return [int(size) for size in dims.split(",") if size]


def _collective(line: str, computation: str, in_step: bool) -> tuple[str, tuple[str, str, int, bool]] | None:
    """Identity of a collective, and kind, shape, members and whether it is overlapped; None for other instructions."""
    if sent := re.search(r'= \((\S+), .* send\(.*_xla_megascale_transfer_type="(\w+)"', line):
        kind = sent[2].lower().replace("_", "-") + " between slices"
        return line, (kind, _arrays(sent[1])[0], 0, False)
    found = re.search(rf"= (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
    if not found:
        return None
    kind, number = found[2], re.search(r"channel_id=(\d+)", line)
    identity = number[1] if number else line
    overlapped = bool(found[3]) or not in_step
    arrays = _arrays(found[1])
    if computation.startswith("all-reduce-scatter"):  # What TPUs call a reduce-scatter: a sum of which a part is kept.
        kind, identity, overlapped = "reduce-scatter", computation, False
    if found[3] and kind != "all-reduce":
        # An asynchronous start gives what it takes and what it makes; the larger one is what arrives.
        arrays = [max(arrays, key=shape_bytes)]
    return identity, (kind, " ".join(sorted(arrays, key=shape_bytes, reverse=True)), _members(line), overlapped)


def _arrays(text: str) -> list[str]:
    return [f"{kind}[{dims}]" for kind, dims in SHAPE.findall(text) if kind in BYTES]


def _members(line: str) -> int:
    """Devices in a group of `replica_groups`, in any of the three ways that XLA writes them."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(listed[1])
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(first[1].split(",")) if first else 0


def _products(lines: list[str]) -> Iterator[float]:
    """Operations of every matrix product of a computation; on a TPU they are convolutions."""
    shapes: dict[str, list[int]] = {}
    for line in lines:
        found = INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, operation, rest = found.groups()
        if array := SHAPE.search(shape):
            shapes[name] = _sizes(array[2])
        if operation == "convolution":
            left, right = (shapes[operand] for operand in re.findall(r"%([\w.-]+)", rest.partition(")")[0]))
            yield 2 * _multiplications(left, right, shapes[name], rest)
        elif operation == "dot":
            left = shapes[re.findall(r"%([\w.-]+)", rest)[0]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            yield 2 * math.prod(shapes[name]) * math.prod(left[axis] for axis in _sizes(contracted[1] if contracted else ""))


def _multiplications(left: list[int], right: list[int], out: list[int], text: str) -> float:
    """Of a convolution, those with padding and with the zeros between dilated elements left out, as XLA counts them."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels, text
    window = dict(re.findall(r"(\w+)=(-?[\dx_-]+)", (re.search(r"window=\{([^}]*)\}", text) or {1: ""})[1]))
    total = float(right[labels[2].index("i")] * right[labels[2].index("o")] * out[labels[3].index("b")])
    for axis in sorted(set(labels[2]) - {"i", "o"}):
        place = int(axis)
        sizes = {
            key: int(window[key].split("x")[place]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        }
        low = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
        total *= _positions(left[labels[1].index(axis)], right[labels[2].index(axis)], out[labels[3].index(axis)], low, **sizes)
    return total


def _positions(size: int, kernel: int, out: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of a kernel element and an output position, along one axis, that meet an element of the input.

    Batched products are convolutions whose window is the batch, of tens of thousands: positions are reckoned, not tried. Output `p`
    and kernel element `e` meet place `p * stride + e * rhs_dilate - low` of the input, whose elements stand at multiples of
    `lhs_dilate`. So those of one `e` are an interval of `p`, of which one in `every` counts.
    """
    offset = low - np.arange(kernel, dtype=np.int64) * rhs_dilate
    common = math.gcd(stride, lhs_dilate)
    every = lhs_dilate // common
    first = np.maximum(-(-offset // stride), 0)
    last = np.minimum(((size - 1) * lhs_dilate + offset) // stride, out - 1)
    start = offset // common * pow(stride // common, -1, every) % every  # p * stride = offset, modulo lhs_dilate.
    found = (last - start) // every - (first - 1 - start) // every
    return int(np.where(offset % common == 0, np.maximum(found, 0), 0).sum())
