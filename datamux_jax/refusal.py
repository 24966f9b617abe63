"""Why a compiler refuses a step, and by how much it is too large."""

from __future__ import annotations

import re

from datamux_jax.errors import InputError, brief
from datamux_jax.topology import Topology

# The ways in which libtpu says it, in the order `(used, capacity)`.
SIZES = (
    re.compile(r"Used ([\d.]+[KMGTP]?) of ([\d.]+[KMGTP]?) hbm"),
    re.compile(r"\(([\d.]+[KMGTP]?)\) exceeds available HBM \(([\d.]+[KMGTP]?)\)"),
)
OUT_OF_MEMORY = re.compile(r"Ran out of memory (in memory space hbm|on HBM)")
UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


class OutOfMemory(InputError):
    """A step does not fit into the memory of a device: more devices or micro-batches may help.

    Attributes:
      used: bytes that it needs; None where the compiler does not say.
      capacity: bytes that a device has for programs, as the compiler has it; None likewise.
    """

    def __init__(self, message: str, used: int | None = None, capacity: int | None = None) -> None:
        super().__init__(message)
        self.used, self.capacity = used, capacity

    @property
    def lack(self) -> int | None:
        """Bytes that a device lacks."""
        return None if self.used is None or self.capacity is None else self.used - self.capacity


def refusal(error: Exception, topology: Topology | None) -> InputError:
    """What a compiler's error means: an `OutOfMemory`, or another refusal."""
    text = str(error)
    where = topology or "these devices"
    if not OUT_OF_MEMORY.search(text):
        return InputError(
            f"The compiler refuses the step for {where}: {brief(error)[:300]} Another mesh, dtype or topology may do."
        )
    found = next((sizes for pattern in SIZES if (sizes := pattern.search(text))), None)
    way_out = "Use more chips, a larger mesh.fsdp or mesh.tensor, accumulation, remat = 'full', or fewer batch_groups."
    if not found:
        return OutOfMemory(f"The step does not fit into the memory of {where}: {brief(error)[:300]} {way_out}")
    used, capacity = map(_bytes, found.groups())
    why = f"it needs {found[1]} of the {found[2]} that a device has, {(used - capacity) / 2**30:.2f}G too much"
    return OutOfMemory(f"The step does not fit into the memory of {where}: {why}. {way_out}", used, capacity)


def _bytes(text: str) -> int:
    """Of `15.75G`, in powers of 1,024."""
    unit = text[-1] if text[-1] in UNITS else ""
    return round(float(text.removesuffix(unit)) * 1024 ** UNITS[unit])
