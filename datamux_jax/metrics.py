"""Metrics as weighted sums: what is added up can be merged across batches, micro-batches and hosts without bias.

A `Sums` maps a name to `(total, weight)`, two arrays of one shape: scalars, or `[N]` with one entry an instance slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Sums = Mapping[str, tuple[Any, Any]]
Totals = dict[str, tuple[np.ndarray, np.ndarray]]


def merge(parts: Iterable[Sums]) -> Totals:
    """Adds up sums; totals are kept in float64, so that a million batches lose nothing."""
    merged: Totals = {}
    for part in parts:
        for name, (total, weight) in part.items():
            pair = (np.asarray(total, np.float64), np.asarray(weight, np.float64))
            old = merged.get(name)
            merged[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])
    return merged


def means(sums: Sums) -> dict[str, Any]:
    """Weighted means: `name` over everything, and `name_per_slot`, a list, where the sums have an instance axis.

    A mean without weight is None, not zero: nothing was measured.
    """
    out: dict[str, Any] = {}
    for name, (total, weight) in sums.items():
        total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
        out[name] = _ratio(total.sum(), weight.sum())
        if total.ndim:
            out[f"{name}_per_slot"] = [_ratio(t, w) for t, w in zip(total, weight, strict=True)]
    return out


def _ratio(total: Any, weight: Any) -> float | None:
    return float(total / weight) if weight > 0 else None
