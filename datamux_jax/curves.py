"""Learning curves of an experiment: one panel a metric, one line a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datamux_jax import workdir
from datamux_jax.metrics_log import read_lines

# Metric -> title of its panel; those that no run has are left out.
PANELS = {
    "retrieval_accuracy": "token retrieval, accuracy",
    "state_loss": "hidden states, squared error",
    "mlm_loss": "MLM loss",
    "mlm_accuracy": "MLM accuracy",
    "replaced_accuracy": "replaced tokens found, accuracy",
    "accuracy": "accuracy",
    "matthews": "Matthews' correlation",
    "f1": "F1",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
    "entity_f1": "entity F1",
}


def points(lines: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Steps and values of a metric in the lines of a run's `metrics.jsonl`."""
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]


def plot(path: Path, runs: Mapping[str, Path], title: str) -> bool:
    """Draws the curves of all runs, of training batches thin and of evaluations bold; says whether there are any.

    Args:
      path: the picture.
      runs: name -> folder.
      title: of the picture.
    """
    lines = {name: read_lines(run) for name, run in runs.items()}
    panels: dict[str, list[str]] = {}
    for metric in PANELS:
        # Metrics of whole sets of predictions are there in evaluations alone.
        names = [name for name in runs if max(len(points(lines[name], prefix + metric)) for prefix in ("", "eval_")) > 1]
        if names:
            panels[metric] = names
    if not panels:
        return False
    import matplotlib  # Heavy import, needed here alone.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), constrained_layout=True, squeeze=False)
    colors: dict[str, Any] = {name: f"C{index}" for index, name in enumerate(runs)}
    for axes, (metric, names) in zip(all_axes[0], panels.items(), strict=True):
        for name in names:
            evaluated = points(lines[name], f"eval_{metric}")
            thin = {"linewidth": 0.8, "alpha": 0.6} if evaluated else {"linewidth": 1.5, "label": name or "run"}
            if trained := points(lines[name], metric):
                axes.plot(*zip(*trained, strict=True), color=colors[name], **thin)
            if evaluated:
                axes.plot(
                    *zip(*evaluated, strict=True), "o-", color=colors[name], label=name or "run", markersize=3, linewidth=1.5
                )
        if metric.endswith("accuracy"):
            axes.set_ylim(0, 1.02)
        axes.set_title(PANELS[metric], fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    with workdir.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    return True
