"""The pictures of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax import workdir
from datamux_jax.analysis.points import Points
from datamux_jax.losses import NO_LABEL

MARKS = 10  # Labels or tokens with a colour of their own; all others are grey.
POINTS = 2000  # More would cover each other.


def save(path: Path, title: str, panels: Sequence[Callable[[Any], None]], columns: int, size: tuple[float, float]) -> None:
    """Draws panels into one picture, row by row.

    Args:
      path: of the PNG.
      title: of the picture.
      panels: each draws onto the axes that it is given.
      columns: panels in a row.
      size: width and height of a panel in inches.
    """
    import matplotlib  # Heavy import, needed here alone.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(panels) // columns)
    shape = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=shape, constrained_layout=True, squeeze=False)
    for panel, where in zip(panels, axes.flat, strict=True):
        panel(where)
    figure.suptitle(title, fontsize=11)
    with workdir.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def layers(path: Path, found: dict[str, Any], title: str, instances: int) -> None:
    """Norm, magnitude and entropy against the layer."""
    heads = {"norm": "norm of activations", "magnitude": "mean absolute activation", "entropy": "entropy of attention, nats"}
    lines = [(f"N = {instances}", found, "#1f5fa8")]
    if plain := found.get("against"):
        lines.append(("N = 1", plain, "grey"))

    def panel(name: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for text, one, color in lines:
                numbers = np.arange(1, len(one[name]) + 1)
                axes.plot(numbers, one[name], "o-", color=color, label=text, markersize=4)
                if name == "entropy":
                    axes.plot(numbers, one["largest_entropy"], ":", color=color, label=f"{text}, uniform attention")
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            axes.set_title(heads[name], fontsize=10)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

        return draw

    there = [name for name in heads if name in found]
    save(path, title, [panel(name) for name in there], len(there), (4.2, 3.6))


def interference(path: Path, found: dict[str, Any], title: str) -> None:
    """Similarity beside chance, and predictions, against the slot."""
    second = "accuracy" if "accuracy" in found else "squared_error"
    slots = np.arange(1, len(found["similarity_per_slot"]) + 1)

    def similarity(axes: Any) -> None:
        axes.plot(slots, _numbers(found["similarity_per_slot"]), "o-", color="#1f5fa8", label="one instance, other companions")
        axes.plot(slots, _numbers(found["chance_per_slot"]), "o:", color="grey", label="different instances (chance)")
        axes.set_title("cosine between demultiplexed states", fontsize=10)
        axes.set_ylim(min(0, axes.dataLim.y0 - 0.02), 1.02)

    def predictions(axes: Any) -> None:
        mean, error = (_numbers(found[f"{name}_per_slot"]) for name in (second, f"{second}_std"))
        axes.errorbar(
            slots, mean, yerr=error, fmt="o-", color="#1f5fa8", capsize=3, label=f"{second.replace('_', ' ')} ± over draws"
        )
        other = "changed" if second == "accuracy" else "spread"
        text = "predictions changed" if second == "accuracy" else "spread of a prediction over draws"
        axes.plot(slots, _numbers(found[f"{other}_per_slot"]), "o-", color="#c0504d", label=text)
        axes.set_title("predictions", fontsize=10)
        axes.set_ylim(bottom=0, top=1.02 if second == "accuracy" else None)

    def framed(draw: Callable[[Any], None]) -> Callable[[Any], None]:
        def panel(axes: Any) -> None:
            draw(axes)
            axes.set_xlabel("slot")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

        return panel

    save(path, title, [framed(similarity), framed(predictions)], 2, (4.8, 3.8))


def retrieval(path: Path, found: dict[str, Any], title: str) -> None:
    """A map of slots and positions."""
    there = [j for j, count in enumerate(found["counts"]) if count]
    values = np.array([[np.nan if row[j] is None else row[j] for j in there] for row in found["table"]], float)

    def draw(axes: Any) -> None:
        extent = (there[0] - 0.5, there[-1] + 0.5, len(values) + 0.5, 0.5)
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        axes.set_xlabel("position")
        axes.set_ylabel("slot")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.figure.colorbar(image, ax=axes, label="tokens read back")

    save(path, title, [draw], 1, (8, 1.6 + 0.25 * len(values)))


def projection(path: Path, mixed: Points, states: Points, title: str, name: Callable[[int], str] | None, kind: str) -> None:
    """Mixed states by what stands in the first and in the last slot, demultiplexed ones by slot and by label.

    Args:
      path: of the PNG.
      mixed: points of mixed states.
      states: points of demultiplexed states.
      title: of the picture.
      name: of a class, tag or token; None where marks are numbers.
      kind: what marks are, such as "label".
    """
    instances = mixed.mark.shape[1]
    assert states.slot is not None
    slots = states._replace(mark=states.slot)
    save(
        path,
        title,
        [
            scatter(mixed._replace(mark=mixed.mark[:, 0]), f"mixed, by {kind} in slot 1", name),
            scatter(mixed._replace(mark=mixed.mark[:, -1]), f"mixed, by {kind} in slot {instances}", name),
            scatter(slots, "demultiplexed, by slot", lambda slot: f"slot {slot + 1}"),
            scatter(states, f"demultiplexed, by {kind}", name),
        ],
        2,
        (5, 4),
    )


def scatter(points: Points, title: str, name: Callable[[int], str] | None) -> Callable[[Any], None]:
    """A panel of points, coloured by mark; at most `POINTS` of them, drawn at random."""
    chosen = np.random.default_rng(0).permutation(len(points.xy))[:POINTS]
    (x, y), mark = points.xy[chosen].T, points.mark[chosen]

    def draw(axes: Any) -> None:
        if name is None:
            drawn = axes.scatter(x, y, c=mark, s=9, cmap="viridis", linewidths=0)
            axes.figure.colorbar(drawn, ax=axes)
        else:
            values, counts = np.unique(mark, return_counts=True)
            common = np.sort(values[np.argsort(-counts, kind="stable")[:MARKS]])
            rest = ~np.isin(mark, common)
            if rest.any():
                axes.scatter(x[rest], y[rest], color="lightgrey", s=6, linewidths=0, label="others")
            for number, value in enumerate(common):
                here = mark == value
                text = "nothing" if value == NO_LABEL else name(int(value))
                axes.scatter(x[here], y[here], color=f"C{number}", s=9, linewidths=0, label=text)
            axes.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"first component, {points.share[0]:.0%} of the variance", fontsize=8)
        axes.set_ylabel(f"second, {points.share[1]:.0%}", fontsize=8)
        axes.tick_params(labelsize=7)

    return draw


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
