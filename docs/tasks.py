"""Prints the tables of docs/tasks.md and draws its pictures: python docs/tasks.py runs (the folder of its runs)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from datamux_jax import metrics_log

# Task -> its heading and its metric.
TASKS = {
    "sst2": ("SST-2, accuracy", "accuracy"),
    "cola": ("CoLA, Matthews x 100", "matthews"),
    "ewt": ("EWT tagging, accuracy", "accuracy"),
    "rte": ("RTE, accuracy", "accuracy"),
    "stsb": ("STS-B, Spearman x 100", "spearman"),
}
COUNTS = (1, 2, 5, 10)
# Ending of a run's name -> its warm-up.
KINDS = {
    "": "none",
    "-warm": "retrieval",
    "-states": "states",
    "-mean": "states, pool=mean",
    "-own": "states, own texts",
    "-own-mean": "states, own texts, pool=mean",
}
DRAWN = {"": ("tab:blue", ":"), "-warm": ("tab:orange", "--"), "-states": ("tab:green", "-")}  # Those in the pictures: how.
LONG = "-long"  # Ending of runs of more steps, after states.
SMOOTHED = 5  # Logged lines that a point of a curve is the mean of.


def scores(runs: Path, task: str, n: int, kind: str, ensemble: int = 1) -> dict[str, Any] | None:
    """What the evaluation of a run wrote, if there is one."""
    name = f"metrics-ensemble-{ensemble}.json" if ensemble > 1 else "metrics.json"
    path = runs / f"{task}-n{n}{kind}" / f"n{n}" / name
    return json.loads(path.read_text()) if path.exists() else None


def line(one: dict[str, Any] | None, metric: str) -> list[str]:
    """The cells of an evaluation: the score, its standard deviation over groupings, lowest and highest slot, retrieval."""
    if one is None:
        return ["", "", ""]
    slots = _slots(one, metric)
    mean = f"{100 * one[metric]:.1f}" + (f" ± {100 * one[f'{metric}_std']:.1f}" if one["num_instances"] > 1 else "")
    spread = f"{100 * min(slots):.1f} to {100 * max(slots):.1f}" if len(slots) > 1 else ""
    read = one.get("retrieval_accuracy")
    return [mean, spread, "" if read is None else f"{100 * read:.1f}"]


def table(runs: Path, task: str) -> str:
    """The table of a task."""
    shown = [(n, kind, "" if n == 1 else warm_up) for n in COUNTS for kind, warm_up in KINDS.items()]
    return _table(runs, task, "warm-up", [one for one in shown if scores(runs, task, *one[:2])])


def longer(runs: Path, task: str) -> str:
    """The table of the runs with more steps beside those with the usual number, N by N; "" where there are none."""
    counts = [n for n in COUNTS if scores(runs, task, n, LONG)]
    found = [(n, kind, scores(runs, task, n, kind)) for n in counts for kind in ("" if n == 1 else "-states", LONG)]
    shown = [(n, kind, f"{one['step']:,}") for n, kind, one in found if one]
    return _table(runs, task, "steps", shown) if shown else ""


def _table(runs: Path, task: str, column: str, shown: list[tuple[int, str, str]]) -> str:
    """A row for each N, ending of a run's name, and text of `column`."""
    title, metric = TASKS[task]
    rows = [["N", column, title, "its slots", "token retrieval", "fed 5 times"], ["-"] * 6]
    for n, kind, text in shown:
        one, often = (scores(runs, task, n, kind, ensemble) for ensemble in (1, 5))
        rows.append([str(n), text, *line(one, metric), line(often, metric)[0]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(runs: Path) -> pyplot.Figure:
    """Score against N, one panel a task."""
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(16, 3.6), layout="constrained")
    for panel, (task, (title, metric)) in zip(panels, TASKS.items(), strict=True):
        plain = scores(runs, task, 1, "")
        for kind, (color, _) in DRAWN.items():
            label = f"warm-up: {KINDS[kind]}"
            found = [(n, one) for n in COUNTS[1:] if (one := scores(runs, task, n, kind))]
            points = [(1, plain)] * (plain is not None) + found
            if found:
                slots = [[one[metric], *_slots(one, metric)] for _, one in points]
                low, high = ([100 * side(values) for values in slots] for side in (min, max))
                panel.plot([n for n, _ in points], [100 * one[metric] for _, one in points], "o-", color=color, label=label)
                panel.fill_between([n for n, _ in points], low, high, color=color, alpha=0.15, linewidth=0)
            for n in COUNTS[1:]:
                if often := scores(runs, task, n, kind, ensemble=5):
                    panel.plot([n], [100 * often[metric]], "*", color=color, markersize=11, label=f"{label}, fed 5 times")
        panel.set(title=title, xlabel="N", xscale="log", xticks=_counts(runs, task))
        panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _slots(one: dict[str, Any], metric: str) -> list[float]:
    return [score for score in one.get(f"{metric}_per_slot") or [] if score is not None]


def _counts(runs: Path, task: str) -> list[int]:
    return [n for n in COUNTS if any(scores(runs, task, n, kind) for kind in KINDS)]


def curves(runs: Path) -> pyplot.Figure:
    """The task's training loss against the step, one panel a task."""
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(16, 3.6), layout="constrained")
    for panel, (task, (title, _)) in zip(panels, TASKS.items(), strict=True):
        for color, n in enumerate(COUNTS):
            for kind, (_, style) in DRAWN.items():
                logged = metrics_log.read_lines(runs / f"{task}-n{n}{kind}" / f"n{n}")
                points = [(one["step"], one["task_loss"]) for one in logged if "task_loss" in one]
                if not points:
                    continue
                means = [
                    sum(loss for _, loss in points[max(0, i + 1 - SMOOTHED) : i + 1]) / min(i + 1, SMOOTHED)
                    for i in range(len(points))
                ]
                label = f"N = {n}" + ("" if n == 1 else f", {KINDS[kind]}")
                panel.plot([step for step, _ in points], means, "-" if n == 1 else style, color=f"C{color}", label=label)
        panel.set(title=title.partition(",")[0], xlabel="step", ylabel="training loss of the task", ylim=(0, None))
        panel.grid(alpha=0.3)
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def main() -> None:
    runs = Path(sys.argv[1])
    for task in TASKS:
        print(table(runs, task), end="\n\n")
    for task in TASKS:
        if more := longer(runs, task):
            print(more, end="\n\n")
    images = Path(__file__).parent / "images"
    draw(runs).savefig(images / "tasks.png", dpi=90, facecolor="white")
    curves(runs).savefig(images / "tasks-curves.png", dpi=90, facecolor="white")


if __name__ == "__main__":
    main()
