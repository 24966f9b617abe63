"""What a benchmark leaves: tables, a picture, and where and with what it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import datamux_jax
from datamux_jax import breakdown, contenders, report, workdir
from datamux_jax.breakdown import WHOLE
from datamux_jax.errors import InputError

TITLES = {"groups": "equal groups", "instances": "equal instances", "device": "device only", "end_to_end": "end to end"}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")


def machine(load_before: float) -> dict[str, Any]:
    """What is measured on; `load_before` is the `load` before anything was started."""
    devices = jax.devices()
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": contenders.threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": jax.default_backend(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "load_before": load_before,
    }


def load() -> float:
    """Processes that want to run, mean of the last minute: what else the machine does shows before the benchmark."""
    return os.getloadavg()[0]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(kinds: Iterable[str]) -> dict[str, str]:
    """Of Python and of the packages that contenders of these kinds run on."""
    names = dict.fromkeys(PACKAGES)
    for kind in kinds:
        names |= dict.fromkeys(contenders.OTHERS[kind][0] if kind in contenders.OTHERS else ())
    found = {"datamux_jax": datamux_jax.__version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # Run from a checkout that is not installed.
            continue
    return found


def read_results(files: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracies in `metrics.json` of runs and `report.json` of experiments: `name`, `num_instances`, `metric`, `value`, `std`.

    Raises:
      InputError: a file that is neither, or nothing of a task in any of them.
    """
    found = []
    for file in files:
        contents = workdir.read_json(Path(file))
        scores = contents["scores"] if "scores" in contents else {Path(file).parent.name: contents}
        for name, score in scores.items():
            if not isinstance(score, dict) or "metrics" not in score or "num_instances" not in score:
                raise InputError(
                    f"--results={file} holds no evaluation. Give the metrics.json of runs, or the report.json of an experiment."
                )
            for metric in score["metrics"][:1]:
                of = {"name": name, "num_instances": score["num_instances"], "metric": metric}
                if score.get(metric) is None:
                    raise InputError(f"--results={file}: {name} has no value of {metric}. Evaluate it anew, or leave it out.")
                found.append({**of, "value": score[metric], "std": score.get(f"{metric}_std", 0.0)})
    if files and not found:
        raise InputError(f"--results={','.join(files)}: no run there learned a task, so there is no accuracy. Name others.")
    if len(different := sorted({one["metric"] for one in found})) > 1:
        raise InputError(
            f"--results={','.join(files)} have different metrics ({', '.join(different)}). Name results of one task."
        )
    return found


def write(folder: Path, contents: dict[str, Any]) -> None:
    """Writes `benchmark.md` and `benchmark.png`, and prints the tables."""
    text = markdown(contents)
    workdir.write_text(folder / "benchmark.md", text)
    plot(folder / "benchmark.png", contents)
    print(
        f"\n{text}\nWritten to {', '.join(str(folder / f'benchmark{ending}') for ending in ('.md', '.json', '.png'))}",
        flush=True,
    )


def markdown(contents: dict[str, Any]) -> str:
    """The tables, with what one must know to trust them."""
    settings, on = contents["settings"], contents["machine"]
    what = "Training step" if settings["step"] == "train" else "Prediction"
    lines = [f"# {contents['title']}", "", f"    {contents['command']}", "", *_notes(contents), ""]
    for balance in settings["balances"]:
        for scope in settings["scopes"]:
            rows = [row for row in contents["rows"] if (row["balance"], row["scope"]) == (balance, scope)]
            lines += [f"## {what}, {TITLES[balance]}, {TITLES[scope]}", "", *_table(rows, contents["reference"]), ""]
    if contents["stages"]:
        lines += ["## Stages of a prediction, each compiled by itself", "", *_stages(contents["stages"]), ""]
    if contents["results"]:
        lines += ["## Accuracy", "", *_accuracies(contents["results"]), ""]
    built_with = ", ".join(f"{name} {version}" for name, version in contents["versions"].items())
    lines += [
        f"{on['cpu']}, {on['platform']}; {on['devices']} x {on['backend'].upper()} ({on['device_kind']}); {on['threads']} CPU threads "
        f"for every contender; load {on['load_before']:.1f} before, {on['load_after']:.1f} after. {built_with}.",
        "",
    ]
    return "\n".join(lines)


def _notes(contents: dict[str, Any]) -> list[str]:
    settings = contents["settings"]
    notes = [
        f"Medians of {settings['windows']} windows of {settings['seconds']} s (at least one call), all rows interleaved in one "
        "process; compiling (for others: loading, exporting) and the first call are left out, and stand in columns of their own. "
        f"IQR: interquartile range over median. Ratio: to {contents['reference']}, median of the ratios window by window; per N: "
        "that over the ratio of their N. Rows are full; weights are random unless a run was given.",
        "",
        {
            "program": "Memory: what the compiled program holds at once on a device, by the compiler: arguments (parameters included), "
            "results, temporaries. Other libraries do not say.",
            "process": "Memory: peak resident memory while calling, in a process of its own, libraries and parameters included; "
            "on devices that count, their peak.",
        }[settings["memory"]],
    ]
    named = {name: one for name, one in contents["networks"].items() if one["what"]}
    for name, one in named.items():
        notes += ["", f"{name}: {one['what']}; logits differ from ours by {one['largest_difference_of_logits']:.1g} at most."]
    return notes


def _memory(row: Mapping[str, Any]) -> int | None:
    return next((row[key] for key in ("device_peak_bytes", "peak_rss_bytes", "program_bytes") if row.get(key)), None)


def _table(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    base = next(row["num_instances"] for row in rows if row["name"] == reference)
    header = [
        *("network", "N", "parameters", "groups", "instances a call", "instances/s", "IQR"),
        *("ratio", "per N", "setup, s", "first call, s", "memory"),
    ]
    cells = []
    for row in rows:
        memory = _memory(row)
        cells.append(
            [
                row["name"],
                str(row["num_instances"]),
                f"{row['parameters'] / 1e6:.1f}M",
                str(row["groups"]),
                str(row["instances_per_call"]),
                _rate(row["instances_per_second"]),
                f"{row['spread']:.1%}",
                f"{row['ratio']:.2f}x",
                f"{row['ratio'] * base / row['num_instances']:.2f}",
                f"{row['setup_seconds']:.1f}",
                f"{row['first_call_seconds']:.2f}",
                f"{memory / 2**20:,.0f} MiB" if memory else "",
            ]
        )
    return report.table(header, cells)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(one["name"] for one in stages))
    kinds = [kind for kind in (*breakdown.STAGES, WHOLE) if any(one["stage"] == kind for one in stages)]
    rows = []
    for name in names:
        own = {one["stage"]: one["milliseconds"] for one in stages if one["name"] == name}
        rows.append([name, *(f"{own[kind]:.2f} ms" if kind in own else "" for kind in kinds)])
    return report.table(["network", *kinds], rows)


def _accuracies(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[one["name"], str(one["num_instances"]), f"{100 * one['value']:.1f} ± {100 * one['std']:.1f}"] for one in results]
    return report.table(["run", "N", f"{report.TASKS[results[0]['metric']]}, times 100"], rows)


def plot(path: Path, contents: dict[str, Any]) -> None:
    """Throughput against N, one line for each kind of network, balance and scope; beside it accuracy, where results were given."""
    import matplotlib  # Heavy import, needed here alone.

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = contents["results"]
    figure, panels = plt.subplots(
        1, 2 if results else 1, figsize=(12 if results else 7, 4.6), constrained_layout=True, squeeze=False
    )
    _plot_throughput(panels[0][0], contents)
    if results:
        points = sorted((one["num_instances"], 100 * one["value"], 100 * one["std"]) for one in results)
        panels[0][1].errorbar(*zip(*points, strict=True), fmt="o-", capsize=3)
        panels[0][1].set_ylabel(f"{report.TASKS[results[0]['metric']]}, times 100")
    for axes in panels[0]:
        axes.set_xlabel("N, instances in one row")
        axes.set_xscale("log", base=2)
        ticks = sorted({row["num_instances"] for row in (*contents["rows"], *results)})
        axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
        axes.grid(alpha=0.3)
    figure.suptitle(contents["title"], fontsize=11)
    with workdir.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _plot_throughput(axes: Any, contents: dict[str, Any]) -> None:
    several = {key: len({row[key] for row in contents["rows"]}) > 1 for key in ("balance", "scope")}
    kinds = list(dict.fromkeys(row["kind"] for row in contents["rows"]))
    lines: dict[tuple[str, str, str], list[Any]] = {}
    for row in contents["rows"]:
        lines.setdefault((row["kind"], row["balance"], row["scope"]), []).append(row)
    for (kind, balance, scope), rows in lines.items():
        label = ", ".join([kind, *(TITLES[value] for key, value in (("balance", balance), ("scope", scope)) if several[key])])
        style = {
            "color": f"C{kinds.index(kind)}",
            "marker": "o" if balance == "groups" else "s",
            "linestyle": "-" if scope == "device" else ":",
        }
        points = sorted((row["num_instances"], row["instances_per_second"]) for row in rows)
        if kind in contenders.OTHERS:  # They have no N: a level to compare with.
            axes.axhline(points[0][1], linewidth=1, label=label, **{key: style[key] for key in ("color", "linestyle")})
        else:
            axes.plot(*zip(*points, strict=True), markersize=4, label=label, **style)
    axes.set_yscale("log")
    axes.set_ylabel("instances per second (median)")
    axes.legend(fontsize=7)
