"""Draws docs/images/idea.png, the picture of the idea in the README: python docs/idea.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLOURS = ["#d1495b", "#edae49", "#00798c"]


def box(axes: plt.Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: int = 10) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#333333", linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#333333") -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, linewidth=1.4, color=colour, shrinkA=3, shrinkB=3)
    )


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 3.3))
    texts = ["guten Morgen", "bonjour", "buongiorno"]
    labels = ["de", "fr", "it"]
    for i, (text, label, colour) in enumerate(zip(texts, labels, COLOURS, strict=True)):
        y = 2.2 - i
        box(axes, 0.0, y, 1.75, 0.6, text, colour + "40")
        box(axes, 2.35, y, 0.95, 0.6, rf"$\varphi_{i + 1}(x_{i + 1})$", colour + "80")
        arrow(axes, (1.77, y + 0.3), (2.33, y + 0.3), colour)
        arrow(axes, (3.32, y + 0.3), (4.08, 1.5), colour)
        arrow(axes, (7.92, 1.5), (8.58, y + 0.3), colour)
        box(axes, 8.6, y, 0.6, 0.6, label, colour + "40")
    box(axes, 4.1, 1.1, 0.9, 0.8, "mix\n(mean)", "#eeeeee")
    box(axes, 5.5, 0.75, 1.1, 1.5, "network,\nrun once", "#c9d6ea")
    box(axes, 7.0, 1.1, 0.9, 0.8, "unmix", "#eeeeee")
    arrow(axes, (5.02, 1.5), (5.48, 1.5))
    arrow(axes, (6.62, 1.5), (6.98, 1.5))
    for x, text in ((0.9, "N inputs"), (2.8, "one fixed\nmap each"), (6.05, "one row instead of N"), (8.9, "N predictions")):
        axes.text(x, 3.15, text, ha="center", va="center", fontsize=10, color="#333333")
    axes.set_xlim(-0.1, 9.4)
    axes.set_ylim(0.0, 3.5)
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "idea.png")
