"""Knowledge distillation: a run learns from the outputs of another one, its teacher, beside the labels (Hinton et al. 2015).

The teacher, as a rule the plain network fine-tuned on the same task, reads every training example once, before the training starts.
What it says lies in the run's folder, so that a restart goes on with the very same numbers, even if the teacher is gone by then:

    RUN/teacher.npy   class logits `[n, C]` float32, numbers `[n]` float32, or logits of tags `[n, L, C]` float16
    RUN/teacher.json  which checkpoint, of which data, and a checksum of the file; written last
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datamux_jax import distributed, leaves, losses, saved, scoring, sharding, workdir
from datamux_jax.data import cache, pipeline
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.errors import InputError
from datamux_jax.model import call
from datamux_jax.plan import Plan
from datamux_jax.progress import Progress
from datamux_jax.runs import Run, load_run

FILE = "teacher.npy"
ABOUT = "teacher.json"
ROOM = 4 * 2**30  # Largest file: while it is made, all of it is in memory.
CHUNK = 8192  # Examples that are scored at a time; bounds what is in memory besides.


def check(plan: Plan, run: Path) -> None:
    """Checks, before anything is written, that the run named by `distill.teacher` can teach its outputs; nothing without one.

    Raises:
      InputError: it is missing, has no checkpoint or no head, learned something else, or its outputs are too large.
    """
    config = plan.config
    if not losses.has_teacher(config):
        return
    path = workdir.find(config.distill.teacher, run)
    if not path.exists():
        raise InputError(
            f"distill.teacher = {config.distill.teacher!r} exists neither in the new run's folder, {run}, nor in the current one. Name "
            "the folder of a run that was trained on the same task, or leave it empty."
        )
    theirs = workdir.load_single(path, f"distill.teacher = {config.distill.teacher!r}")
    check_task(config, theirs)
    _check_format(config, theirs, plan.format, Format.load(path))
    if not any(name.startswith("classifier/") for name in leaves.shapes(path)):
        raise InputError(
            f"distill.teacher = {config.distill.teacher!r} has no task head. Name a run that was trained on the task."
        )
    if (size := plan.teacher_bytes) > ROOM:
        raise InputError(
            f"The outputs of distill.teacher = {config.distill.teacher!r} for {len(plan.arrays['inputs']):,} examples would take "
            f"{size / 2**30:.1f} GiB, and {ROOM / 2**30:.0f} is the limit. Lower data.length, or train without a teacher."
        )
    if config.resume:
        _check_resumed(config, run, path)


def check_task(config: Any, theirs: Any) -> None:
    """Raises InputError if the config `theirs` of a teacher is that of another task than `config`."""
    different = [
        f"{key} = {there!r} there, {here!r} here"
        for key, there, here in (
            ("objective", theirs.objective, config.objective),
            ("data.source", theirs.data.source, config.data.source),
            ("data.name", theirs.data.name, config.data.name),
        )
        if there != here
    ]
    if different:
        raise InputError(
            f"distill.teacher = {config.distill.teacher!r} learned another task: {'; '.join(different)}. Name a run that was trained "
            "on the same one."
        )


def _check_format(config: Any, theirs: Any, ours: Format, found: Format) -> None:
    """Raises InputError if the teacher has other labels, or its outputs do not belong to what the run predicts."""
    name = f"distill.teacher = {config.distill.teacher!r}"
    if (found.label_names, found.inputs) != (ours.label_names, ours.inputs):
        raise InputError(
            f"{name} predicts {_labels(found)} of {found.inputs}, but this run {_labels(ours)} of {ours.inputs}. Name a run that was "
            "trained on the same labels."
        )
    if not ours.token_labels:
        return  # One output an example: the teacher may read other tokens.
    if found.length != ours.length or found.tokenizer != ours.tokenizer:
        raise InputError(
            f"{name} tags other tokens: data.length is {found.length} there and {ours.length} here, and the tokenizers are "
            f"{'the same' if found.tokenizer == ours.tokenizer else 'not the same'}. Train the teacher with both as they are here."
        )
    if theirs.demux.name == "index" and theirs.demux.prefix == "cut":
        raise InputError(
            f"{name} has demux.prefix = 'cut', so the last tokens have no tags. Name a teacher that tags all tokens."
        )


def _check_resumed(config: Any, run: Path, path: Path) -> None:
    """Raises InputError if the run named by `resume` learned from something else than the teacher in `path`."""
    before = workdir.find(config.resume, run) / ABOUT
    if before.exists() and workdir.read_json(before)["teacher"] != _chosen(path):
        raise InputError(
            f"resume = {config.resume!r} learned from another teacher, or another checkpoint of it, than distill.teacher = "
            f"{config.distill.teacher!r} names here, {path}. Restore that one, or use init_from to start a training of its own."
        )


def _labels(fmt: Format) -> str:
    return (
        f"the labels {', '.join(fmt.label_names[:8])}{', ...' * (len(fmt.label_names) > 8)}" if fmt.label_names else "numbers"
    )


def teacher_arrays(plan: Plan, run: Path) -> Arrays:
    """What a batch holds besides: `teacher`, one row a training example, as `plan.batch_shapes` has it; nothing without a teacher.

    Taken from the run's folder if it is there, else computed and put there, by all processes together.

    Raises:
      InputError: the teacher does not fit, or is not the one that the run began with.
    """
    if not losses.has_teacher(plan.config):
        return {}
    data = plan.fingerprint
    if not distributed.from_primary(lambda: _usable(plan, run, data)):
        # Nothing was checked if the run has checkpoints: its file must have been lost.
        distributed.on_primary(lambda: check(plan, run))
        teacher = load_run(distributed.from_primary(lambda: str(workdir.find(plan.config.distill.teacher, run))))
        distributed.on_primary(lambda: _check_unchanged(run, teacher))
        outputs = _outputs(plan, teacher)
        distributed.on_primary(lambda: _save(run, outputs, {"teacher": _identity(teacher.path, teacher.step), "data": data}))
    return {"teacher": np.load(run / FILE, mmap_mode="r")}


def _usable(plan: Plan, run: Path, data: str) -> bool:
    """Whether the folder holds the outputs to learn from.

    Once the run has a checkpoint they are those that it began with, whatever has become of the teacher since.
    """
    if not (run / ABOUT).exists() or not (run / FILE).exists():
        return False
    about = workdir.read_json(run / ABOUT)
    if about["data"] != data or about["checksum"] != _file_digest(run / FILE):
        return False
    began = saved.newest_step(run) is not None
    return began or about["teacher"] == _chosen(workdir.find(plan.config.distill.teacher, run))


def _check_unchanged(run: Path, teacher: Run) -> None:
    """Raises InputError if a run that has begun would go on with another teacher."""
    if saved.newest_step(run) is None or not (run / ABOUT).exists():
        return
    about = workdir.read_json(run / ABOUT)
    if about["teacher"] != _identity(teacher.path, teacher.step):
        raise InputError(
            f"{run / FILE} is damaged or gone, and the teacher in {teacher.path} is no longer the one that this run began with (step "
            f"{about['teacher']['step']} then, {teacher.step} now). Restore one of them from a copy, or start again in a new --workdir."
        )


def _chosen(path: Path) -> dict[str, Any] | None:
    """The identity of the checkpoint that a teacher is loaded from, unless it is damaged."""
    step = saved.chosen_step(path, workdir.load_config(path))
    return None if step is None else _identity(path, step)


def _identity(path: Path, step: int) -> dict[str, Any]:
    found = saved.read(path, step)["checksums"]
    return {"step": step, "checksum": cache.digest(found)}


def _outputs(plan: Plan, teacher: Run) -> np.ndarray:
    """The teacher's outputs for all training examples, in their order; in the type that batches have."""
    config = plan.config
    # The same examples, but as the teacher reads them: its tokens and its length.
    arrays = pipeline.splits_of(config, teacher.format)[config.data.train_split]
    count, shape = len(arrays["inputs"]), plan.batch_shapes["teacher"]
    outputs = np.empty((count, *shape.shape[2:]), shape.dtype)
    step = _output_step(teacher)
    with contextlib.closing(Progress("teacher", count)) as progress:
        for start in range(0, count, CHUNK):
            part = {name: array[start : start + CHUNK] for name, array in arrays.items()}
            scored = scoring.score(step, teacher.params, part, teacher.config, teacher.mesh, seed=0)
            assert scored.outputs is not None
            outputs[start : start + CHUNK] = scored.outputs[0]
            progress.update(min(start + CHUNK, count))
            distributed.stop_if_asked("while the teacher reads the training data")
    return outputs


def _output_step(teacher: Run) -> scoring.Step:
    """As `scoring.scoring_step`, but of tagging too the logits come out, and nothing is measured."""
    task = losses.task_loss(teacher.config)

    def step(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        h = call(teacher.model, params, "encode", batch["inputs"], batch["mask"])
        return {}, sharding.constrain(task(teacher.model, params, h, batch, {}, False)[1])

    return jax.jit(step)


def _save(run: Path, outputs: np.ndarray, about: dict[str, Any]) -> None:
    if not np.isfinite(outputs).all():
        raise InputError("The teacher's outputs are not all finite, so nothing can be learned from them. Train it again.")
    with workdir.replacing(run / FILE) as temporary, temporary.open("wb") as handle:
        np.save(handle, outputs)
    workdir.write_json(run / ABOUT, {**about, "checksum": _file_digest(run / FILE)})


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
