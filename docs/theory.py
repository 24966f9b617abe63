"""Prints the tables of docs/theory.md and draws docs/images/residue.png: python docs/theory.py (some minutes)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from datamux_jax import residue


def draw(path: Path, rows: Sequence[residue.Residue]) -> None:
    instances = sorted({row.instances for row in rows})
    figure, panels = plt.subplots(1, len(instances), figsize=(11, 3.6), sharey=True, constrained_layout=True)
    for axes, n in zip(panels, instances, strict=True):
        for colour, mux in enumerate(residue.MIXERS):
            mine = [row for row in rows if (row.mux, row.instances) == (mux, n)]
            sizes = [row.hidden_size for row in mine]
            axes.loglog(sizes, [row.own for row in mine], "o-", color=f"C{colour}", label=mux)
            axes.loglog(sizes, [row.joint for row in mine], "x:", color=f"C{colour}", alpha=0.6)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(f"N = {n}")
        axes.set_xlabel("D, width of the mixed row")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("relative error")
    panels[-1].legend(fontsize=7, loc="center right")
    figure.suptitle("Attention on mixed rows against separate attentions, d = 8 (solid: own reading; dotted: joint reading)")
    figure.savefig(path, dpi=110, facecolor="white")


def main() -> None:
    key = jax.random.key(0)
    for width in (8, 64):
        spec = dataclasses.replace(residue.SPEC, hidden_size=width, mlp_dim=4 * width)
        print(residue.table(residue.norms(key, spec=spec)), flush=True)
    rows = residue.attention(key)
    print(residue.table(rows))
    draw(Path(__file__).parent / "images" / "residue.png", rows)


if __name__ == "__main__":
    main()
