"""The report of an experiment: a table on screen, `report.md`, `report.json`, `report.png` and `curves.png`."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import jax

from datamux_jax import curves, workdir

BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
Scores = dict[str, dict[str, Any]]
# Metrics of tasks -> heads of their columns.
TASKS = {
    "accuracy": "accuracy",
    "matthews": "Matthews",
    "f1": "F1",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "entity_f1": "entity F1",
    "combined": "combined",
}
# Those that are no shares; given times 100 too, as is usual.
NO_SHARES = ("matthews", "pearson", "spearman", "combined")


def write(
    folder: Path, config: Any, scores: Scores, measured: dict[str, Any], configs: dict[str, Any], suffix: str = ""
) -> dict[str, Any]:
    """Writes the files and prints the table.

    Args:
      folder: where to.
      config: of the experiment.
      scores: evaluation of each run, by name.
      measured: `throughput` of each classifier, by name; `baseline`, if there is one.
      configs: of each run.
      suffix: between `report` and the ending of the files' names.

    Returns:
      What `report.json` holds.
    """
    contents = {"title": config.title or "Run", "scores": scores, **measured}
    text = markdown(contents, configs)
    files = [folder / f"report{suffix}{ending}" for ending in (".md", ".json", ".png")] + [folder / "curves.png"]
    curves.plot(files[3], {name: folder / name for name in configs}, contents["title"])
    workdir.write_text(files[0], text)
    workdir.write_json(files[1], contents)
    if measured["throughput"]:
        plot(files[2], contents)
    print("\n" + text)
    print("Written to " + ", ".join(str(file) for file in files if file.exists()), flush=True)
    return contents


def markdown(contents: dict[str, Any], configs: dict[str, Any]) -> str:
    """The report as Markdown, readable on a terminal."""
    scores, throughput = contents["scores"], contents["throughput"]
    header = [
        "run",
        "N",
        *TASKS.values(),
        "per slot",
        "MLM loss",
        "MLM accuracy",
        "replaced",
        "states",
        "token retrieval",
        "instances/s",
        "ratio",
    ]
    rows = []
    for name, score in scores.items():
        speed = throughput.get(name, {})
        rows.append(
            [
                name or "run",
                str(score["num_instances"]),
                *[with_std(score, metric) for metric in TASKS],
                _slots(score),
                f"{score['mlm_loss']:.3f}" if score.get("mlm_loss") is not None else "",
                with_std(score, "mlm_accuracy"),
                with_std(score, "replaced_accuracy"),
                f"{1 - score['state_loss']:.3f}" if score.get("state_loss") is not None else "",
                with_std(score, "retrieval_accuracy"),
                f"{speed['instances_per_second']:,.0f}" if speed else "",
                f"{speed['ratio']:.2f}x" if speed else "",
            ]
        )
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [f"# {contents['title']}", "", *table([header[i] for i in keep], [[row[i] for i in keep] for row in rows]), ""]
    lines += [note + "\n" for note in _notes(contents, next(iter(configs.values())).eval.batch_groups)]
    slots = _slot_rows(scores)
    if slots:
        title = _per_slot(scores)
        lines += [f"{title[0].upper()}{title[1:]} by slot:", "", *slots, ""]
    return "\n".join(lines)


def _notes(contents: dict[str, Any], groups: int) -> list[str]:
    """What the columns of the table mean."""
    scores, throughput = contents["scores"], contents["throughput"]
    first = next(iter(scores.values()))
    several = first["groupings"] > 1
    notes = [
        f"Measured on {first['examples']:,} examples of the {first['split']} split, each in "
        f"{first['groupings']} random grouping{'s' if several else ''}{' and there in every slot' if first['every_slot'] else ''}"
        f"{': mean, and standard deviation over groupings' if several else ''}.",
    ]
    if any(score["num_instances"] > 1 and score["metrics"] for score in scores.values()):
        notes.append(
            f"Per slot: the lowest and the highest {_per_slot(scores)} among the N positions that an instance can take in its group."
        )
    if plain := [head for metric, head in TASKS.items() if metric in NO_SHARES and any(metric in s for s in scores.values())]:
        notes.append(f"Times 100: {', '.join(plain)}.")
    if cut := sorted({score["words_cut"] for score in scores.values() if score.get("words_cut")}):
        why = "they lie beyond the length, or the tokenizer leaves nothing of them"
        notes.append(f"Counted as wrong, since {why}: {' or '.join(f'{count:,}' for count in cut)} words.")
    if any("state_loss" in score for score in scores.values()):
        notes.append(
            "States: one minus the mean squared error of guessing the teacher's last hidden states, of variance 1 each."
        )
    if any("retrieval_accuracy" in score for score in scores.values()):
        notes.append(
            "Token retrieval: share of the input tokens (all instances, without [CLS] and padding) read back from the mixed state."
        )
    if throughput:
        notes.append(
            f"Instances/s: predictions, {groups} mixed rows a call, on {_machine()}; device only, after warm-up, medians of "
            f"interleaved windows. Ratio: to {next(iter(throughput)) or 'itself'}, median of the ratios window by window."
        )
    if "baseline" in contents:
        notes.append(f"Plain baseline ({contents['baseline']['name']}), same splits: {contents['baseline']['accuracy']:.1%}.")
    return notes


def plot(path: Path, contents: dict[str, Any]) -> None:
    """The first metric of the task against measured throughput, one point a run; nothing if they differ in it."""
    names = list(contents["throughput"])
    metrics = {contents["scores"][name]["metrics"][0] for name in names}
    if len(metrics) > 1:
        return
    import matplotlib  # Heavy import, needed here alone.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (metric,) = metrics
    x = [contents["throughput"][name]["instances_per_second"] for name in names]
    y = [100 * contents["scores"][name][metric] for name in names]
    error = [100 * contents["scores"][name][f"{metric}_std"] for name in names]
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.errorbar(x, y, yerr=error, fmt="o-", color="#1f5fa8", capsize=3)
    for index, (name, at_x, at_y) in enumerate(zip(names, x, y, strict=True)):
        score, speed = contents["scores"][name], contents["throughput"][name]
        label = f"N={score['num_instances']}  {_shown(metric, at_y / 100)}  {speed['ratio']:.1f}x"
        offset = -20 if index % 2 else 11  # Below and above in turn: neighbours may be close.
        axes.annotate(
            label, (at_x, at_y), textcoords="offset points", xytext=(0, offset), ha="center", fontsize=9, bbox=BACKGROUND
        )
    if "baseline" in contents and metric == "accuracy":
        level = 100 * contents["baseline"]["accuracy"]
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate("plain baseline", (min(x), level), textcoords="offset points", xytext=(0, 4), fontsize=8, color="grey")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("instances per second (median, device only)")
    split = contents["scores"][names[0]]["split"]
    axes.set_ylabel(f"{TASKS[metric]} on the {split} split{', times 100' if metric in NO_SHARES else ', %'}")
    axes.set_title(contents["title"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    with workdir.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if metric in NO_SHARES else f"{value:.1%}"


def with_std(score: dict[str, Any], name: str) -> str:
    if score.get(name) is None:
        return ""
    text = _shown(name, score[name])
    spread = score["num_instances"] > 1 and score["groupings"] > 1
    return f"{text} ± {100 * score[name + '_std']:.1f}" if spread else text


def _by_slot(score: dict[str, Any]) -> list[float]:
    """The first metric of the task in each slot that has examples."""
    slots = score[f"{score['metrics'][0]}_per_slot"] if score["metrics"] else []
    return [value for value in slots if value is not None]


def _slots(score: dict[str, Any]) -> str:
    slots = _by_slot(score)
    return " to ".join(_shown(score["metrics"][0], value) for value in (min(slots), max(slots))) if len(slots) > 1 else ""


def _per_slot(scores: Scores) -> str:
    """What is shown per slot, in words."""
    metrics = {score["metrics"][0] for score in scores.values() if score["metrics"]}
    return TASKS[metrics.pop()] if len(metrics) == 1 else "first metric of the task"


def _slot_rows(scores: Scores) -> list[str]:
    return [
        f"- N={score['num_instances']} ({name or 'run'}): " + " ".join(f"{100 * value:.1f}" for value in _by_slot(score))
        for name, score in scores.items()
        if len(_by_slot(score)) > 1
    ]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _machine() -> str:
    device = jax.devices()[0]
    count = jax.device_count()
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    return f"{count} x {device.platform.upper()} ({kind})"
