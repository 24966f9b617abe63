"""Prints the tables of docs/theory.md and draws docs/images/residue.png: python docs/theory.py (some minutes)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import matplotlib

from datamux_jax import residue


def main() -> None:
    matplotlib.use("Agg")
    key = jax.random.key(0)
    for width in (8, 64):
        spec = dataclasses.replace(residue.SPEC, hidden_size=width, mlp_dim=4 * width)
        print(residue.table(residue.norms(key, spec=spec)), flush=True)
    rows = residue.attention(key)
    print(residue.table(rows))
    path = Path(__file__).parent / "images" / "residue.png"
    residue.draw(rows).savefig(path, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
