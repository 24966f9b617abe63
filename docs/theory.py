"""Prints the tables of docs/theory.md and draws docs/images/residue.png: python docs/theory.py (some minutes)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib

from datamux_jax import residue


def by_size(rows: Sequence[residue.Residue]) -> str:
    """One line a mixer and N, one column a width: the error of each reading, and the condition number."""
    sizes = sorted({row.hidden_size for row in rows})
    lines = [["mixer", "N", *(f"D = {size}: own, joint, condition" for size in sizes)]]
    lines.append(["---"] * len(lines[0]))
    for mux, n in sorted({(row.mux, row.instances) for row in rows}):
        mine = [row for row in rows if (row.mux, row.instances) == (mux, n)]
        lines.append([mux, str(n), *(f"{row.own:.2g}, {row.joint:.1g}, {row.condition:.2g}" for row in mine)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    matplotlib.use("Agg")
    key = jax.random.key(0)
    for width in (8, 64):
        spec = dataclasses.replace(residue.SPEC, hidden_size=width, mlp_dim=4 * width)
        print(residue.table(residue.norms(key, spec=spec)), flush=True)
    rows = residue.attention(key)
    print(by_size(rows))
    path = Path(__file__).parent / "images" / "residue.png"
    residue.draw(rows).savefig(path, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
