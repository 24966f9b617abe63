"""A whole analysis: what is asked for is checked, every part that has a meaning is computed, and tables and pictures are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamux_jax import saved, workdir
from datamux_jax.analysis import pictures, tables
from datamux_jax.analysis.companions import interference
from datamux_jax.analysis.layerwise import layer_statistics, layers_of
from datamux_jax.analysis.parts import PARTS, check_examples, left_out
from datamux_jax.analysis.points import Points, projection
from datamux_jax.analysis.positions import retrieval_by_position
from datamux_jax.data.formats import Arrays
from datamux_jax.errors import InputError
from datamux_jax.evaluate import examples_of
from datamux_jax.losses import TASK_LOSSES
from datamux_jax.runs import Run, load_run

NAME = "analysis"


def analyze(
    path: str | Path,
    *,
    against: str | Path | None = None,
    output: str | Path | None = None,
    split: str = "",
    examples: int = 256,
    groupings: int = 1,
    companions: int = 10,
) -> dict[str, Any]:
    """Computes all parts for the run in `path`, prints the tables, and writes `analysis.json`, `analysis.md` and `analysis-PART.png`.

    Args:
      path: the folder of a run.
      against: folder of an N = 1 run to compare layers with; default: the one with the same objective in the same experiment.
      output: folder to write to; default: that of the run.
      split: of the run's data; default: the config's `eval.split`.
      examples: the first ones of the split; 0: all.
      groupings: random groupings for layers and retrieval.
      companions: random sets of companions of each example in each slot, for interference.

    Returns:
      What `analysis.json` holds: for every part its numbers, or `{"left_out": why}`.

    Raises:
      InputError: no such run or split, a checkpoint that is missing, runs that cannot be compared, too few examples, or a folder that
        cannot be written.
    """
    path = Path(path)
    _check_counts(examples=(examples, 0), groupings=(groupings, 1), companions=(companions, 2))
    target = _target(path if output is None else Path(output))
    run = load_run(path)
    split = split or run.config.eval.split
    arrays = examples_of(run, split, examples)
    check_examples(run, len(arrays["inputs"]))
    plain, why_not = _plain(run, Path(against) if against else None)
    missing = left_out(run)

    def part(name: str, compute: Callable[[], Any]) -> Any:
        return {"left_out": missing[name]} if name in missing else compute()

    contents: dict[str, Any] = {
        "run": str(path),
        "num_instances": run.config.num_instances,
        "objective": run.config.objective,
        "step": run.step,
        "split": split,
        "examples": len(arrays["inputs"]),
        "groupings": groupings,
    }
    contents["layers"] = part("layers", lambda: _layers(run, plain, why_not, arrays, groupings))
    contents["interference"] = part("interference", lambda: interference(run, arrays, companions=companions))
    contents["retrieval"] = part("retrieval", lambda: retrieval_by_position(run, arrays, groupings=groupings))
    points = None if "projection" in missing else projection(run, arrays)
    contents["projection"] = part("projection", lambda: _summary(points))
    _write(target, run, contents, points)
    return contents


def _layers(run: Run, plain: Run | None, why_not: str, arrays: Arrays, groupings: int) -> dict[str, Any]:
    """Statistics of the layers of `run`, beside those of the plain one."""
    own: dict[str, Any] = {**layer_statistics(run, arrays, groupings=groupings)}
    if plain is None:
        return own | {"not_against": why_not}
    of_plain = layer_statistics(plain, arrays, label="layers, N = 1")
    return own | {"against": {"run": str(plain.path), "step": plain.step, **of_plain}}


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (count, least) in counts.items():
        if count < least:
            raise InputError(f"{name} = {count} is too few. Ask for at least {least}{' (0: all)' if least == 0 else ''}.")


def _target(folder: Path) -> Path:
    """Checks, before any work, that files can be written to `folder`, which need not exist yet.

    Raises:
      InputError: they cannot.
    """
    if problem := workdir.obstacle(folder):
        raise InputError(f"The analysis cannot be written to {folder}: {problem}. Choose another folder with --output.")
    return folder


def _plain(run: Run, against: Path | None) -> tuple[Run | None, str]:
    """The N = 1 run to compare with, or why there is none.

    Raises:
      InputError: the run that was asked for has N > 1, reads something else, or has other layers.
    """
    if against is None:
        if run.config.num_instances == 1:
            return None, "this is one itself."
        found = _sibling(run)
        if found is None:
            return None, (
                f"no trained one with objective = {run.config.objective!r} stands in the same experiment. Name one with --against."
            )
        plain = load_run(found)
        if _inputs(plain) != _inputs(run):
            return None, f"{found} reads other inputs."
        return (plain, "") if layers_of(plain) == layers_of(run) else (None, f"{found} has other layers.")
    plain = load_run(against)
    if _inputs(plain) != _inputs(run):
        raise InputError(
            f"--against={against} reads other inputs than {run.path}: it has another tokenizer, length or number of features. "
            "Name an N = 1 run that was trained on the same data."
        )
    if plain.config.num_instances != 1:
        raise InputError(
            f"--against={against} is a run with N = {plain.config.num_instances}, but layers are compared with those of a plain "
            "network. Name a run with N = 1, or leave the flag out."
        )
    if layers_of(plain) != layers_of(run):
        (kind, count), (own, number) = layers_of(plain), layers_of(run)
        raise InputError(
            f"--against={against} has other layers than {run.path}: model.backbone = {kind!r} with {count or 'its own'} layers beside "
            f"{own!r} with {number or 'its own'}. They are compared one by one: name an N = 1 run of the same depth."
        )
    return plain, ""


def _sibling(run: Run) -> Path | None:
    """The first trained N = 1 run with the same objective in the experiment that `run` belongs to."""
    folder = run.path.resolve().parent
    if not (folder / workdir.CONFIG).is_file():
        return None
    for name in workdir.load_config(folder).runs:
        beside = run.path.parent / name if run.path.name else folder / name
        if beside.resolve() == run.path.resolve() or not (beside / workdir.CONFIG).is_file():
            continue
        config = workdir.load_config(beside)
        alike = config.num_instances == 1 and config.objective == run.config.objective
        if alike and saved.newest_step(beside) is not None:
            return beside
    return None


def _inputs(run: Run) -> tuple[Any, ...]:
    """What an example looks like to the run."""
    tokenizer = run.format.tokenizer
    return run.format.input_shape, tokenizer.fingerprint if tokenizer else ""


def _summary(points: tuple[Points, Points] | None) -> dict[str, Any]:
    assert points is not None
    return {
        name: {
            "points": len(one.xy),
            "share": list(one.share),
            "between_slots": one.between_slots,
            "between_labels": one.between_marks,
        }
        for name, one in zip(("mixed", "demultiplexed"), points, strict=True)
    }


def _write(folder: Path, run: Run, contents: dict[str, Any], points: tuple[Points, Points] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{run.path.name or run.path}, N = {run.config.num_instances}"
    text = tables.markdown(contents)
    workdir.write_json(folder / f"{NAME}.json", contents)
    workdir.write_text(folder / f"{NAME}.md", text)
    drawn = [name for name in PARTS if "left_out" not in contents[name]]
    files = {name: folder / f"{NAME}-{name}.png" for name in drawn}
    if "layers" in files:
        pictures.layers(files["layers"], contents["layers"], f"Layers of {title}", run.config.num_instances)
    if "interference" in files:
        pictures.interference(files["interference"], contents["interference"], f"Interference in {title}")
    if "retrieval" in files:
        pictures.retrieval(files["retrieval"], contents["retrieval"], f"Token retrieval of {title}")
    if points is not None:
        pictures.projection(files["projection"], *points, f"States of {title}", *_names(run))
    print("\n" + text)
    written = [folder / f"{NAME}.md", folder / f"{NAME}.json", *files.values()]
    print("Written to " + ", ".join(map(str, written)), flush=True)


def _names(run: Run) -> tuple[Callable[[int], str] | None, str]:
    """Names of what pictures are coloured by, and what it is."""
    fmt = run.format
    if run.config.objective == "regression":
        return None, "number"
    if run.config.objective in TASK_LOSSES:
        return (lambda label: fmt.label_names[label]), "tag" if fmt.token_labels else "label"
    tokenizer = fmt.tokenizer
    return (lambda token: repr(tokenizer.decode([token])) if tokenizer else str(token)), "token"
