"""What a run consists of, checked before anything is written: config, data, network, optimizer and mesh."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datamux_jax import flops, losses, objectives, optimizer, saved, scoring, sharding, task_metrics
from datamux_jax.backbones.vision import VISION
from datamux_jax.build import build, build_second
from datamux_jax.classifier import build_classifier
from datamux_jax.config import validate
from datamux_jax.data import buckets, pipeline
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.errors import InputError, choose
from datamux_jax.layers import on_cuda
from datamux_jax.metrics_log import Work, check_boards
from datamux_jax.model import MultiplexedTransformer, Network
from datamux_jax.objectives import OBJECTIVES, Objective
from datamux_jax.step import TrainState, make_step, placed, state_maker


def build_model(config: Any, fmt: Format) -> Network:
    """The network of `config` for data of the format `fmt`."""
    if config.model.backbone in VISION:
        return build_classifier(config, num_classes=len(fmt.label_names))
    return build(config, num_classes=len(fmt.label_names), vocab_size=fmt.vocab_size, max_length=fmt.length, tokens=fmt.tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose config, data format, network and mesh fit together. Nothing is written or computed yet."""

    config: Any
    mesh: jax.sharding.Mesh
    format: Format
    model: Network
    second: MultiplexedTransformer | None
    tx: Any
    make: Callable[[jax.Array], TrainState]

    @functools.cached_property
    def boxed(self) -> TrainState:
        """Shapes of the state, boxed with logical axes."""
        return jax.eval_shape(self.make, jax.random.key(0))

    @functools.cached_property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        return placed(self.boxed, self.mesh)

    @functools.cached_property
    def splits(self) -> dict[str, Arrays]:
        """The examples, read when they are first asked for.

        Raises:
          InputError: the data cannot be read.
        """
        return pipeline.splits_of(self.config, self.format)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.config.objective](self.model, self.config, self.second)

    @property
    def arrays(self) -> Arrays:
        """What is trained on."""
        return self.splits[self.config.data.train_split]

    @property
    def examples(self) -> Arrays:
        """What is scored during training."""
        return scoring.first_examples(self.splits[self.config.eval.split], self.config.eval.examples)

    @functools.cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a global batch."""
        return self.shapes_of(self.config.batch_groups)

    @functools.cached_property
    def buckets(self) -> buckets.Buckets | None:
        """Those of what is trained on."""
        return buckets.of(self.config, self.arrays)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of rows that training batches have, the longest first."""
        return self.buckets.lengths[::-1] if self.buckets else (self.format.length,)

    def shapes_of(self, groups: int, length: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a global batch of so many groups, with rows of the given length or of the longest."""
        fmt, where = self.format, sharding.batch_sharding(self.mesh)
        length = length or fmt.length
        rows = (groups, self.config.num_instances)
        shapes = {
            "inputs": ((*rows, length, *fmt.input_shape[1:]), fmt.input_dtype),
            "mask": ((*rows, length), "int32"),
            "label": ((*rows, length) if fmt.token_labels else rows, "float32" if fmt.numbers else "int32"),
            "weight": (rows, "float32"),
        }
        if losses.has_teacher(self.config):
            outputs = (len(fmt.label_names),) if fmt.label_names else ()
            # Logits of every token are many, and half the bits say as much.
            tagging = ((*rows, length, *outputs), "float16")
            shapes["teacher"] = tagging if fmt.token_labels else (rows + outputs, "float32")
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in shapes.items()}

    @property
    def teacher_bytes(self) -> int:
        """Size of a teacher's outputs for all that is trained on; 0 if none are read."""
        if not losses.has_teacher(self.config):
            return 0
        row = self.batch_shapes["teacher"]
        return len(self.arrays["inputs"]) * math.prod(row.shape[2:]) * row.dtype.itemsize

    def jitted_step(self) -> Any:
        """The training step, not compiled yet."""
        return make_step(
            self.objective,
            self.tx,
            self.abstract,
            self.mesh,
            self.config.accumulation,
            lambda gradients: optimizer.norm(gradients, self.config.mux.learned),
        )

    def missing_bytes(self, run: Path) -> int:
        """Disk that the run in `run` needs beside what it takes: checkpoints that stay, one being written, room for the rest.

        A teacher's outputs count even if they are there already: they may have to be written anew.
        """
        state = sum(leaf.size * 4 for leaf in jax.tree.leaves(self.abstract))
        kept = self.config.checkpoint.keep + self.config.checkpoint.keep_best
        return max(state * (kept + 1) + 20_000_000 - saved.used_bytes(run), 0) + self.teacher_bytes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs if the data differ that this process trains on, or how they are read."""
        tokenizer = self.format.tokenizer.fingerprint if self.format.tokenizer else ""
        content = hashlib.blake2b(f"{self.format} {tokenizer}".encode(), digest_size=16)
        if not self.format.corpus:  # Running text has a fingerprint of its own, in the format.
            for name, array in sorted(self.arrays.items()):
                content.update(f"{name} {array.shape} {array.dtype}".encode())
                content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def model_flops(self, length: int | None = None) -> float:
        """Floating-point operations of one update, all devices together, by the usual convention (`flops.training_flops`).

        Args:
          length: of the rows; by default the longest.
        """
        keys = {name: jax.eval_shape(lambda: jax.random.key(0)) for name in ("dropout", "corruption")}
        batch, params = self.shapes_of(self.config.batch_groups, length), self.abstract.params
        total = flops.training_flops(
            lambda params, batch, rngs: self.objective(params, batch, rngs, True), *(params, batch, keys)
        )
        teacher = self.second
        if teacher is None or "teacher" not in params:
            return total
        # A teacher has no backward pass.
        return total - 2 * flops.matmul_flops(functools.partial(objectives.teacher_states, teacher), params["teacher"], batch)

    def work(self, length: int) -> Work:
        """What one update on rows of the given length amounts to."""
        peak = flops.peak(self.mesh.devices.flat[0])
        share = None if peak is None else self.model_flops(length) / (peak * self.mesh.size)
        return Work(self.config.batch_groups * self.config.num_instances * length, share)


def prepare(config: Any, run: Path | None = None) -> Plan:
    """Checks the config against itself, the data and this machine.

    Args:
      config: complete config.
      run: the folder that it is for; paths in the config may be relative to it.

    Raises:
      InputError: something does not fit.
    """
    validate(config)
    check_boards(config)
    if config.attention == "cudnn" and not on_cuda():
        raise InputError(
            f"attention = 'cudnn' trains on NVIDIA GPUs, but JAX runs on {jax.default_backend()} here. Use attention = 'xla', or "
            "install datamux_jax[cuda] on a machine that has one."
        )
    mesh = sharding.make_mesh(config, config.batch_groups)
    fmt = pipeline.format_of(config, run)
    _check_data(config, fmt)
    if config.objective in losses.TASK_LOSSES:
        task_metrics.check(fmt.metrics, config.objective, fmt.label_names)
    plan = assemble(config, fmt, mesh)
    _ = plan.boxed  # Before the data are read: sizes that do not fit show here.
    for key in ("data.train_split", "eval.split"):
        section, name = key.split(".")
        choose(plan.splits, config[section][name], f"The split {key} =")
    if config.checkpoint.keep_best:
        _check_best(plan)
    return plan


def assemble(config: Any, fmt: Format, mesh: jax.sharding.Mesh) -> Plan:
    """The network, optimizer and state of a valid config, for data of the format `fmt`, without the data."""
    model = build_model(config, fmt)
    second = build_second(config, model)
    tx = optimizer.make(config)
    return Plan(config, mesh, fmt, model, second, tx, state_maker(config, fmt, model, tx, second))


def _check_data(config: Any, fmt: Format) -> None:
    """Raises InputError if the data have not what the network and the objective need."""
    if config.model.backbone in VISION and fmt.vocab_size:
        raise InputError(
            f"model.backbone = {config.model.backbone!r} takes images, but the data source {config.data.source!r} has texts. Use "
            "'encoder', or a source of images."
        )
    needs_tokens = config.objective in ("retrieval", "mlm", "electra", "states")
    if not fmt.vocab_size and (needs_tokens or config.retrieval_loss_coeff):
        raise InputError(
            f"objective = {config.objective!r} with retrieval_loss_coeff = {config.retrieval_loss_coeff} needs tokens, but the data "
            f"source {config.data.source!r} has feature vectors. Use a text source, or classification without retrieval."
        )
    if fmt.corpus and not needs_tokens:
        raise InputError(
            f"objective = {config.objective!r} needs labels, but the data source {config.data.source!r} is running text. Use "
            "'retrieval', 'states', 'mlm' or 'electra', or a source with labels."
        )
    if config.objective == "tagging" and not fmt.token_labels:
        raise InputError(
            f"objective = 'tagging' needs a label for every token, but the data source {config.data.source!r} has one for an example. "
            "Use 'classification', or a tagging source."
        )
    if config.objective == "classification" and fmt.token_labels:
        raise InputError(
            f"objective = 'classification' needs a label for every example, but the data source {config.data.source!r} has one for "
            "every word. Use 'tagging'."
        )
    if config.objective == "classification" and fmt.numbers:
        raise InputError(
            f"objective = 'classification' needs classes, but the labels of the data source {config.data.source!r} are numbers. Use "
            "'regression'."
        )
    if config.objective == "regression" and fmt.label_names:
        raise InputError(
            f"objective = 'regression' predicts a number, but the labels of {config.data.source!r} are classes. Use 'classification'."
        )
    if config.data.buckets and (fmt.corpus or not fmt.vocab_size):
        raise InputError(
            f"data.buckets = True puts texts of similar length together, but inputs of the data source {config.data.source!r} all have "
            "the same length. Set data.buckets to False."
        )
    if config.demux.prefix == "cut" and config.demux.name == "index" and fmt.length <= config.num_instances + 1:
        raise InputError(
            f"demux.prefix = 'cut' takes num_instances + 1 = {config.num_instances + 1} of the data.length = {fmt.length} positions, "
            "which leaves none. Raise data.length, or use demux.prefix = 'extend'."
        )


def _check_best(plan: Plan) -> None:
    """Raises InputError if an evaluation has no number of the name that says which checkpoint is best."""
    config = plan.config
    if not config.eval.every:
        raise InputError(
            f"checkpoint.keep_best = {config.checkpoint.keep_best} needs evaluations during training, but eval.every = 0. Set "
            "eval.every to a number of steps."
        )
    step = scoring.scoring_step(config, plan.model, plan.second)
    sums, outputs = jax.eval_shape(step, plan.abstract.params, plan.batch_shapes, jax.eval_shape(lambda: jax.random.key(0)))
    measured = [] if outputs is None else task_metrics.numbers_of(plan.format.metrics)
    choose([*sums, *measured], config.checkpoint.best, "The metric checkpoint.best =")
