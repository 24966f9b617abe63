"""The report of an experiment: a table on screen, `report.md`, `report.json`, `report.png` and `curves.png`."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import jax

from datamux_jax import curves, workdir

BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
Scores = dict[str, dict[str, Any]]


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
        "accuracy",
        "per slot",
        "MLM loss",
        "MLM accuracy",
        "replaced",
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
                _with_std(score, "accuracy"),
                _slots(score),
                f"{score['mlm_loss']:.3f}" if score.get("mlm_loss") is not None else "",
                _with_std(score, "mlm_accuracy"),
                _with_std(score, "replaced_accuracy"),
                _with_std(score, "retrieval_accuracy"),
                f"{speed['instances_per_second']:,.0f}" if speed else "",
                f"{speed['ratio']:.2f}x" if speed else "",
            ]
        )
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    first = next(iter(scores.values()))
    lines = [f"# {contents['title']}", "", *_table([header[i] for i in keep], [[row[i] for i in keep] for row in rows]), ""]
    groups = next(iter(configs.values())).eval.batch_groups
    several = first["groupings"] > 1
    notes = [
        f"Measured on {first['examples']:,} examples of the {first['split']} split, each in "
        f"{first['groupings']} random grouping{'s' if several else ''}{' and there in every slot' if first['every_slot'] else ''}"
        f"{': mean, and standard deviation over groupings' if several else ''}.",
    ]
    if any(score["num_instances"] > 1 and "accuracy" in score for score in scores.values()):
        notes.append(
            "Per slot: the lowest and the highest accuracy among the N positions that an instance can take in its group."
        )
    if any("retrieval_accuracy" in score for score in scores.values()):
        notes.append(
            "Token retrieval: share of the input tokens (all instances, without [CLS] and padding) read back from the mixed state."
        )
    if throughput:
        notes.append(
            f"Instances/s: classification of {groups} mixed rows a call, on {_machine()}; device only, after warm-up, medians of "
            f"interleaved windows. Ratio: to {next(iter(throughput)) or 'itself'}."
        )
    if "baseline" in contents:
        notes.append(f"Plain baseline ({contents['baseline']['name']}), same splits: {contents['baseline']['accuracy']:.1%}.")
    lines += [note + "\n" for note in notes]
    slots = _slot_rows(scores)
    if slots:
        lines += ["Accuracy by slot:", "", *slots, ""]
    return "\n".join(lines)


def plot(path: Path, contents: dict[str, Any]) -> None:
    """Accuracy against measured throughput, one point a classifier."""
    import matplotlib  # Heavy import, needed here alone.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(contents["throughput"])
    x = [contents["throughput"][name]["instances_per_second"] for name in names]
    y = [100 * contents["scores"][name]["accuracy"] for name in names]
    error = [100 * contents["scores"][name]["accuracy_std"] for name in names]
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.errorbar(x, y, yerr=error, fmt="o-", color="#1f5fa8", capsize=3)
    for name, at_x, at_y in zip(names, x, y, strict=True):
        score, speed = contents["scores"][name], contents["throughput"][name]
        label = f"N={score['num_instances']}  {at_y:.1f}%  {speed['ratio']:.1f}x"
        axes.annotate(label, (at_x, at_y), textcoords="offset points", xytext=(0, 11), ha="center", fontsize=9, bbox=BACKGROUND)
    if "baseline" in contents:
        level = 100 * contents["baseline"]["accuracy"]
        axes.axhline(level, color="grey", linestyle="--", linewidth=1)
        axes.annotate("plain baseline", (min(x), level), textcoords="offset points", xytext=(0, 4), fontsize=8, color="grey")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("instances per second (median, device only)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(contents["title"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    with workdir.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _with_std(score: dict[str, Any], name: str) -> str:
    if score.get(name) is None:
        return ""
    text = f"{score[name]:.1%}"
    spread = score["num_instances"] > 1 and score["groupings"] > 1
    return f"{text} ± {100 * score[name + '_std']:.1f}" if spread else text


def _slots(score: dict[str, Any]) -> str:
    slots = score.get("accuracy_per_slot", [])
    return f"{min(slots):.1%} to {max(slots):.1%}" if len(slots) > 1 else ""


def _slot_rows(scores: Scores) -> list[str]:
    return [
        f"- N={score['num_instances']} ({name or 'run'}): "
        + " ".join(f"{100 * value:.1f}" for value in score["accuracy_per_slot"])
        for name, score in scores.items()
        if len(score.get("accuracy_per_slot", [])) > 1
    ]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _machine() -> str:
    device = jax.devices()[0]
    count = jax.device_count()
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    return f"{count} x {device.platform.upper()} ({kind})"
