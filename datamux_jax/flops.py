"""Floating-point operations of a network, and how many a chip can do: model FLOP utilisation (MFU)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Dense bfloat16 FLOP/s of a chip, from the vendors' data sheets, by the beginning of JAX's name for it; the first match counts.
PEAKS = {
    "TPU v3": 123e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
}


def peak(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where it is not known (a CPU)."""
    return next((value for name, value in PEAKS.items() if device.device_kind.startswith(name)), None)


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of all matrix products in one call, two for each multiplication with its addition.

    Args:
      function: is traced, not run.
      *args: arrays or their shapes (`jax.ShapeDtypeStruct`).
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def training_flops(forward: Callable[..., Any], *args: Any) -> float:
    """Of a training step, by the usual convention: the backward pass costs twice the forward pass; nothing computed again counts."""
    return 3 * matmul_flops(forward, *args)


def _of_jaxpr(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, _ = (variable.aval for variable in equation.invars[:2])
            contracted = equation.params["dimension_numbers"][0][0]
            out = equation.outvars[0].aval
            total += 2 * math.prod(out.shape) * float(np.prod([left.shape[axis] for axis in contracted]))
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        found = [
            times * _of_jaxpr(inner)
            for value in equation.params.values()
            for one in (value if isinstance(value, list | tuple) else [value])
            if hasattr(inner := getattr(one, "jaxpr", one), "eqns")
        ]
        # Of branches, such as those for platforms, one is taken.
        total += max(found, default=0.0) if equation.primitive.name == "cond" else sum(found)
    return total
