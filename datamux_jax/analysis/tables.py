"""The tables of an analysis, as Markdown that reads well on a terminal."""

from __future__ import annotations

from typing import Any

from datamux_jax.analysis.parts import PARTS
from datamux_jax.analysis.readings import READINGS
from datamux_jax.losses import TASK_LOSSES
from datamux_jax.report import table

RANGES = 8  # Columns that positions are put together into.


def markdown(contents: dict[str, Any]) -> str:
    """The whole analysis.

    Args:
      contents: what `analysis.json` holds.
    """
    lines = [
        f"# Inside {contents['run']} (N = {contents['num_instances']}, step {contents['step']:,})",
        "",
        f"Measured on {contents['examples']:,} examples of the {contents['split']} split.",
        "",
    ]
    for part, heading in PARTS.items():
        lines += [f"## {heading}", ""]
        found = contents[part]
        lines += [found["left_out"]] if "left_out" in found else TABLES[part](found, contents)
        lines += [""]
    return "\n".join(lines)


def of_layers(found: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    n = f"N = {contents['num_instances']}"
    plain = found.get("against")
    attention = "entropy" in found
    header = ["layer"]
    for which in (n, "N = 1") if plain else (n,):
        header += [f"norm, {which}", f"magnitude, {which}", *([f"entropy, {which}", "of largest"] if attention else [])]
    rows = []
    for layer in range(len(found["norm"])):
        row = [str(layer + 1)]
        for one in filter(None, (found, plain)):
            row += [f"{one['norm'][layer]:.2f}", f"{one['magnitude'][layer]:.3f}"]
            if attention:
                entropy, largest = one["entropy"][layer], one["largest_entropy"][layer]
                row += [f"{entropy:.3f}", f"{entropy / largest:.0%}" if largest else ""]
        rows.append(row)
    note = (
        f"N = 1 is {plain['run']} (step {plain['step']:,}), fed with the same examples."
        if plain
        else f"Without an N = 1 run to compare with: {found['not_against']}"
    )
    return [
        *table(header, rows),
        "",
        ("Means over real positions. " if attention else "Means over rows, of activations after tanh. ")
        + "Norm: L2 norm of a layer's output; magnitude: mean absolute value of its entries."
        + (" Entropy: of attention, in nats, mean over heads; of largest: relative to uniform attention." if attention else ""),
        "",
        note,
    ]


def of_interference(found: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    what = READINGS[contents["objective"]][1]
    columns = {"similarity": ("similarity", _decimal), "chance": ("chance", _decimal)}
    if "accuracy" in found:
        columns |= {"changed": ("predictions changed", _percent), "accuracy": ("accuracy", _percent)}
        columns |= {"accuracy_std": ("± over draws", _percent)}
    else:
        columns |= {"spread": ("spread of predictions", _decimal), "squared_error": ("squared error", _decimal)}
        columns |= {"squared_error_std": ("± over draws", _decimal)}
    rows = [["all", *[show(found[name]) for name, (_, show) in columns.items()]]]
    for slot in range(contents["num_instances"]):
        rows.append([str(slot + 1), *[show(found[f"{name}_per_slot"][slot]) for name, (_, show) in columns.items()]])
    where = f", at {len(found['positions'])} positions of the rows" if "positions" in found else ""
    return [
        *table(["slot", *[head for head, _ in columns.values()]], rows),
        "",
        f"Each of {found['examples']:,} examples in each slot with {found['companions']} random sets of companions; predicted is: "
        f"{what}. Similarity: cosine between the demultiplexed states of one instance with different companions{where}; chance: "
        "between different instances. "
        + (
            "Changed: draws whose prediction is not the one that most draws give."
            if "accuracy" in found
            else "Spread: standard deviation of a prediction over draws."
        ),
    ]


def of_retrieval(found: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    bounds = ranges(found["counts"])
    header = ["slot", "all", *[f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in bounds]]
    counts = found["counts"]

    def row(name: str, whole: Any, values: list[Any]) -> list[str]:
        cells = []
        for start, stop in bounds:
            there = [(values[j], counts[j]) for j in range(start, stop) if values[j] is not None]
            weight = sum(count for _, count in there)
            cells.append(_percent(sum(value * count for value, count in there) / weight if weight else None))
        return [name, _percent(whole), *cells]

    rows = [row("all", found["accuracy"], found["per_position"])]
    rows += [row(str(i + 1), found["per_slot"][i], values) for i, values in enumerate(found["table"])]
    notes = [
        "Share of the tokens read back from the mixed state, by position in their own text; without padding and position 0."
    ]
    if not found["trained"]:
        notes.append("This run does not train retrieval itself: what it can do is left from the runs that it started from.")
    return [*table(header, rows), "", " ".join(notes)]


def of_projection(found: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    header = ["states", "points", "first component", "second component", "between slots", "between labels"]
    rows = []
    for name in ("mixed", "demultiplexed"):
        one = found[name]
        shares = *one["share"], one["between_slots"], one["between_labels"]
        rows.append([name, f"{one['points']:,}", *[_percent(share) for share in shares]])
    labels = "labels" if contents["objective"] in TASK_LOSSES else "tokens"
    return [
        *table(header, rows),
        "",
        "Shares of the variance: on the two components of the picture, and, of all dimensions, between the means of slots and of "
        f"{labels} (0 for random groups; of mixed states the mean over what stands in each slot).",
    ]


TABLES = {"layers": of_layers, "interference": of_interference, "retrieval": of_retrieval, "projection": of_projection}


def ranges(counts: list[int]) -> list[tuple[int, int]]:
    """Positions that have tokens in at most `RANGES` ranges of equal length, `[start, stop)`."""
    there = [j for j, count in enumerate(counts) if count]
    if not there:
        return []
    start, stop = there[0], there[-1] + 1
    size = -(-(stop - start) // RANGES)
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
