"""Where a run starts: its own newest checkpoint, then `resume` (whole state), then `init_from` (parameters), then scratch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from datamux_jax import convert, distributed, leaves, packaged, saved, teacher, workdir
from datamux_jax.checkpoint import Checkpoints, reader, shapes
from datamux_jax.errors import InputError, few
from datamux_jax.plan import Plan
from datamux_jax.step import TrainState

# May be absent from, surplus in, or of another shape in the parameters that a run starts from: a new task has a new head.
HEADS = ("classifier/", "replaced_head/", "state_heads/", "decoder/", "generator/", "teacher/")
# May be absent besides if the run to start from is a plain network.
MULTIPLEXING = ("mux/", "demux/")

# Parameters of equal shapes mean something else where these differ.
MEANING = ("model.family", "model.layer_norm_eps", "mux.name", "mux.attend_padding", "demux.name", "demux.form")

# What may differ where a training goes on in another folder: how long and how fast, and what changes no number.
RESUMABLE = (
    *("title", "steps", "resume", "init_from", "baseline", "benchmark.", "eval."),
    *("optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay"),
    *workdir.FREE_KEYS,
)


def check(plan: Plan, run: Path) -> None:
    """Checks, before anything is written, the run named by `resume` or `init_from`; of a teacher see `check_teacher`.

    Raises:
      InputError: it is missing, or does not fit.
    """
    config, abstract = plan.config, plan.abstract
    for key, names in (("resume", ()), ("init_from", packaged.PACKAGES)):
        _check_there(key, config[key], names, run)
    if config.resume:
        source = workdir.find(config.resume, run)
        check_resumable(config, source, abstract)
        check_data(plan, source)
        at = saved.newest_step(source)
        if at is not None and at >= config.steps:
            raise InputError(
                f"resume = {str(source)!r} stands at step {at}, so nothing is left to do with steps = {config.steps}. Raise steps, or "
                "use init_from to start another training from its parameters."
            )
    elif config.init_from:
        source = starting_run(config.init_from, config, run)
        try:
            match(source, abstract.params)
        except InputError as error:
            shapes = ("num_instances", "data.length", "model.", "mux.", "demux.")
            different = [text for key, text in _changed(config, source).items() if key.startswith(shapes)]
            raise InputError(f"{error} They differ in: {'; '.join(different)}." if different else str(error)) from error
        check_same_function(config, source)


def check_teacher(plan: Plan, run: Path) -> None:
    """Checks, before anything is written, the network whose states are learned, if any; what resumes has one in its checkpoint.

    Raises:
      InputError: it is missing, or does not fit.
    """
    config = plan.config
    if config.objective == "states" and not config.resume:
        _check_there("distill.teacher", config.distill.teacher, packaged.PACKAGES, run)
        teacher.check(plan, starting_run(config.distill.teacher, config, run))


def _check_there(key: str, name: str, packages: Collection[str], run: Path) -> None:
    """Raises InputError if the config value `key` = `name` is set, and neither a folder nor one of the packages."""
    if name and name not in packages and not workdir.find(name, run).exists():
        others = f" or of a published network, or {', '.join(packages)}" if packages else ""
        raise InputError(
            f"{key} = {name!r} exists neither in the new run's folder, {run}, nor in the current one. Name the folder of a "
            f"run{others}."
        )


def check_data(plan: Plan, run: Path) -> None:
    """Raises InputError if the training in `run` began on other data than those of `plan`; it has a checkpoint."""
    if saved.record(run)["host"]["data"] != plan.fingerprint:
        raise InputError(
            f"The run in {run} began on other data than the config names now: a file, the tokenizer or a package that ships data has "
            "changed since. Restore it, or start again in a new --workdir; nothing was changed."
        )


def initial_state(
    plan: Plan, run: Path, saves: Checkpoints, fresh: Callable[[], TrainState], *, begun: bool
) -> tuple[TrainState, Any]:
    """The state that a run starts from, and what the host saved with it; None for the beginning.

    Args:
      plan: of the run.
      run: its folder.
      saves: its checkpoints.
      fresh: makes a fresh state; what is restored whole needs none, and no memory for it.
      begun: whether the folder holds a checkpoint of its own.
    """
    config, abstract = plan.config, plan.abstract

    def restored(source: Checkpoints) -> tuple[TrainState, Any]:
        _, params, others, host = source.restore(abstract.params, rest(abstract))
        return TrainState(params=params, **others), host

    if begun:
        return restored(saves)
    if config.resume:
        with contextlib.closing(reader(workdir.find(config.resume, run))) as source:
            state, host = restored(source)
        if int(state.step) >= config.steps:
            raise InputError(
                f"resume = {config.resume!r} has gone on to step {int(state.step)} by now, so nothing is left to do with steps = "
                f"{config.steps}. Raise steps in a new --workdir."
            )
        return state, host
    state = fresh()
    params = {name: part for name, part in state.params.items() if name != "teacher"}
    if config.init_from:
        where = distributed.primary_first(lambda: starting_run(config.init_from, config, run))
        params, left = init_from(where, params)
        print(f"{run.name}: starts from {config.init_from}{left}", flush=True)
    if "teacher" in state.params:
        where = distributed.primary_first(lambda: starting_run(config.distill.teacher, config, run))
        params["teacher"] = teacher.load(where, state.params["teacher"])
    return dataclasses.replace(state, params=params), None


def starting_run(name: str, config: Any, run: Path) -> Path:
    """The run that `name` stands for: a published network, or the encoder of an installed package, is converted first.

    Args:
      name: a folder, relative to `run` or to the current one, or a package.
      config: of the run that wants it.
      run: its folder.

    Raises:
      InputError: it cannot be converted, or the package is not installed.
    """
    folder = packaged.encoder(name) if name in packaged.PACKAGES else workdir.find(name, run)
    return convert.converted(folder, config) if convert.is_published(folder) else folder


def rest(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state beside its parameters."""
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _changed(config: Any, source: Path) -> dict[str, str]:
    """The keys in which `config` and that of the run in `source` differ, and how, for an error."""
    ours, theirs = (workdir.flatten(workdir.plain(one)) for one in (config, workdir.load_config(source)))
    return {key: f"{key} = {theirs.get(key)!r} there, {ours[key]!r} here" for key in ours if ours[key] != theirs.get(key)}


def check_same_function(config: Any, source: Path) -> None:
    """Raises InputError if the parameters of the run in `source` would compute something else under `config`."""
    from_plain = workdir.load_config(source).mux.name == "none"
    different = [
        text
        for key, text in _changed(config, source).items()
        if key in MEANING
        and not (from_plain and key.startswith(("mux.", "demux.")))
        and not (key == "demux.form" and config.demux.name != "rsa")
    ]
    if different:
        raise InputError(
            f"init_from = {str(source)!r} has the right shapes, but would compute something else: {'; '.join(different)}. "
            "Set these keys as they are there."
        )


def check_resumable(config: Any, source: Path, abstract: TrainState) -> None:
    """Raises InputError if the training in `source` is not one that `config` can go on with."""
    found = saved.shapes(saved.record(source), "rest")
    if not found:
        raise InputError(
            f"resume = {str(source)!r} has parameters but no training state, as it was converted from a published checkpoint. Use "
            "init_from to start a training from its parameters."
        )
    match(source, abstract.params, "resume", fresh=())
    different = [text for key, text in _changed(config, source).items() if not key.startswith(RESUMABLE)]
    if different or found != saved.shapes({"shapes": shapes({"rest": rest(abstract)})}, "rest"):
        raise InputError(
            f"resume = {str(source)!r} was another training, so going on with it here would be neither the one nor the other: "
            f"{few(different) or 'its optimizer keeps other arrays'}. Set these keys as they are there, or use init_from to start "
            "a training from its parameters."
        )


def match(
    run: Path, params: Any, key: str = "init_from", fresh: tuple[str, ...] = HEADS
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Checks that a network with the parameters `params` (abstract or real) can start from the run in `run`.

    Args:
      run: its folder.
      params: of the network, with shapes.
      key: config key that names the run, for the error.
      fresh: what may be missing there, surplus or of another shape; by default heads. If heads may, a multiplexed network may start
        from a plain one.

    Returns:
      The shapes of all parameters there, by path; and the paths that both networks share.

    Raises:
      InputError: there is no checkpoint, or other leaves are missing, surplus or misshapen; the first of them are listed.
    """
    theirs = leaves.shapes(run)
    ours = {path: tuple(leaf.shape) for path, leaf in leaves.flat(params).items()}
    shared = {path for path in ours if ours[path] == theirs.get(path)}
    mixed, theirs_mixed = (any(path.startswith(MULTIPLEXING) for path in paths) for paths in (ours, theirs))
    if fresh and not theirs_mixed:
        fresh = fresh + MULTIPLEXING
    if mixed == theirs_mixed and all(any(path.startswith("decoder/") for path in paths) for paths in (ours, theirs)):
        fresh = tuple(prefix for prefix in fresh if prefix != "decoder/")  # Where both have one, it is the same or a mistake.
    wrong = {path for path in (ours.keys() | theirs.keys()) - shared if not path.startswith(fresh)}
    if wrong:
        missing, surplus = sorted(wrong - theirs.keys()), sorted(wrong - ours.keys())
        misshapen = [
            f"{path} is {theirs[path]} there and {ours[path]} here" for path in sorted(wrong & ours.keys() & theirs.keys())
        ]
        raise InputError(
            f"{key} = {str(run)!r} does not fit this model. Missing there: {few(missing) or 'nothing'}. Surplus there: "
            f"{few(surplus) or 'nothing'}. Other shapes: {few(misshapen) or 'none'}. Use a run with the same num_instances and the "
            "same model, mux and demux settings."
        )
    return theirs, shared


def init_from(run: Path, params: Any) -> tuple[Any, str]:
    """Starts from the parameters of another run.

    Args:
      run: its folder.
      params: this run's fresh parameters, sharded.

    Returns:
      `params`, with every leaf that both share taken from `run`; and what stayed fresh or was not used there, for people.

    Raises:
      InputError: as `match`.
    """
    theirs, shared = match(run, params)
    ours = leaves.flat(params)
    merged = leaves.nested(ours | leaves.restored(run, {path: ours[path] for path in shared}))
    notes = (("fresh", ours), ("not used", theirs))
    left = [f"; {what}: {', '.join(_groups(set(paths) - shared))}" for what, paths in notes if set(paths) - shared]
    return merged, "".join(left)


def _groups(paths: set[str]) -> list[str]:
    """The first two levels of parameter paths: `demux/keys`, `classifier/out`."""
    return sorted({"/".join(path.split("/")[:2]) for path in paths})
