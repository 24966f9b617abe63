"""Writes a trained predictor as programs that run without this library's network code; `exported.py` reads them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from datamux_jax import exported, workdir
from datamux_jax.errors import InputError, choose
from datamux_jax.plan import build_model
from datamux_jax.predict import Predictor, task_logits
from datamux_jax.runs import Run, load_run

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_run(run: Path, target: Path, platforms: Sequence[str] = ("cpu", "cuda", "tpu")) -> str:
    """Writes the run in `run` into the new folder `target`, as `exported.py` describes it.

    There is one program for each row length, lowered for all platforms; the number of groups is symbolic (any). Parameters lie beside,
    once for all programs, and are an argument of each; those that prediction does not use are left out.

    Args:
      run: folder of a run that was trained for a task.
      target: folder to write; must not exist, or be empty.
      platforms: to lower for, of `PLATFORMS`.

    Returns:
      One paragraph that says what was written.

    Raises:
      InputError: the run cannot be read or has no trained classifier, a platform does not exist, or `target` is taken; nothing has
        been written then.
    """
    for platform in platforms:
        choose(PLATFORMS, platform, "The platform")
    if not platforms:
        raise InputError(f"No platform is named to export for. Name at least one of: {', '.join(PLATFORMS)}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"--to_stablehlo={target} exists and is not an empty folder, so nothing is written there. Choose another one."
        )
    predictor = Predictor(_of_xla(load_run(run)))
    params = traverse_util.flatten_dict(jax.device_get(predictor.run.params), sep="/")
    used = _used(predictor, params)
    # Published where complete: a folder that is half written never has the name asked for.
    partial = target.with_name(target.name + workdir.TEMPORARY)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for length in predictor.lengths:
        program = _program(predictor, used, length, platforms, jax_export.symbolic_shape("b")[0])
        (partial / exported.program_file(length)).write_bytes(program.serialize())
    np.savez(partial / exported.PARAMS, allow_pickle=False, **used)
    predictor.format.save(partial)
    manifest = {
        "version": exported.VERSION,
        "objective": predictor.objective,
        "num_instances": predictor.instances,
        "groups": predictor.groups,
        "cut": predictor.cut,
        "lengths": list(predictor.lengths),
        "platforms": list(platforms),
        "identity": predictor.identity,
        "step": predictor.run.step,
        "jax": jax.__version__,
    }
    workdir.write_json(partial / exported.MANIFEST, manifest)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    size = sum(value.size for value in used.values())
    lengths = ", ".join(map(str, predictor.lengths))
    return (
        f"{run} -> {target}: {predictor.objective}, N = {predictor.instances}, {size:,} parameters; rows of {lengths}; for "
        f"{', '.join(platforms)}."
    )


def _of_xla(run: Run) -> Run:
    """The run with XLA's attention: calls of cuDNN are neither portable nor meant to be kept."""
    if run.config.get("attention", "xla") == "xla":
        return run
    config = run.config.copy_and_resolve_references()
    config.attention = "xla"
    return dataclasses.replace(run, config=config, model=build_model(config, run.format))


def _program(
    predictor: Predictor, params: Mapping[str, np.ndarray], length: int, platforms: Sequence[str] | None, groups: Any
) -> jax_export.Exported:
    """The program for rows of `length` positions: `(params, inputs, mask) -> logits`; `groups` may be symbolic."""
    model, objective, fmt = predictor.run.model, predictor.objective, predictor.format

    def forward(params: dict[str, Any], inputs: jax.Array, mask: jax.Array) -> jax.Array:
        return task_logits(model, objective, traverse_util.unflatten_dict(params, sep="/"), inputs, mask)

    shape = (groups, predictor.instances, length, *fmt.input_shape[1:])
    given = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
    return jax_export.export(jax.jit(forward), platforms=platforms)(
        given, jax.ShapeDtypeStruct(shape, fmt.input_dtype), jax.ShapeDtypeStruct(shape[:3], np.int32)
    )


def _used(predictor: Predictor, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters that prediction reads: the vocabulary head, a generator and the retrieval stack are none of them."""
    # jax drops unused arguments, but of programs with symbolic shapes.
    kept = set(_program(predictor, params, predictor.lengths[-1], None, 1).module_kept_var_idx)
    return {name: params[name] for place, name in enumerate(sorted(params)) if place in kept}
