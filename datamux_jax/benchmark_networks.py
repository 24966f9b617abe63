"""Our networks as something to time: a prediction or a training step, device only and end to end."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from datamux_jax import benchmark_inputs, sharding
from datamux_jax.backbones.vision import VISION
from datamux_jax.build import count_params, init_params
from datamux_jax.errors import InputError
from datamux_jax.inference import OBJECTIVES
from datamux_jax.plan import assemble, build_model
from datamux_jax.predict import Predictor
from datamux_jax.runs import Run, load_run
from datamux_jax.step import born_sharded

STEPS = ("predict", "train")
BALANCES = ("groups", "instances")
SCOPES = ("device", "end_to_end")
SMALL = ("narrow", "shallow")  # What `smaller` makes.


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is measured.

    Attributes:
      name: of its rows.
      kind: "own", a key of `SMALL`, or one of `contenders.OTHERS`.
      config: complete config of the network.
      path: folder of a trained run; None: random weights.
    """

    name: str
    kind: str
    config: Any
    path: Path | None = None


@dataclasses.dataclass
class Timed:
    """One entry at one batch size, compiled and called once.

    Attributes:
      calls: scope -> function without arguments that handles whole batches.
      instances: scope -> instances a call.
      setup_seconds: of compiling, or of what takes its place.
      first_seconds: of the first call after that.
      program_bytes: what the compiled program says it needs; None where there is none.
      parameters: numbers in the network.
    """

    calls: dict[str, Callable[[], Any]]
    instances: dict[str, int]
    setup_seconds: float
    first_seconds: float
    program_bytes: int | None
    parameters: int


def smaller(config: Any, kind: str) -> Any:
    """A copy of `config` that is half as wide ("narrow", with half the heads), or has a third of the layers ("shallow").

    Of BERT base that is 384 wide with 12 layers, and 768 wide with 4.

    Raises:
      InputError: the sizes cannot be halved.
    """
    config = config.copy_and_resolve_references()
    m = config.model
    if m.backbone in VISION:
        raise InputError(
            f"--contenders={kind} makes a Transformer smaller, but model.backbone = {m.backbone!r} is none. Leave it out."
        )
    if kind == "shallow":
        m.num_layers = max(1, m.num_layers // 3)
        return config
    keys = ("hidden_size", "num_heads", "mlp_dim", "embedding_size")
    for key in keys:
        if m[key] % 2:
            raise InputError(
                f"--contenders=narrow halves model.{key} = {m[key]}, which is odd. Leave it out, or choose a network whose "
                f"{', '.join(keys)} are even."
            )
        m[key] //= 2
    return config


def check(entry: Entry, step: str) -> None:
    """Raises InputError if the network cannot be timed that way."""
    objective = entry.config.objective
    if step == "predict" and objective not in OBJECTIVES:
        raise InputError(
            f"{entry.name} has objective = {objective!r}, which predicts nothing to time. Measure --step=train, or a config or "
            f"run with objective = {' or '.join(map(repr, OBJECTIVES))}."
        )


class Network:
    """One of our networks, with its parameters; each batch size that is timed is compiled for itself."""

    def __init__(self, entry: Entry, step: str) -> None:
        self.entry, self.step = entry, step
        self.state: Any = (
            None  # Of training: the newest one; all batch sizes go on from it, since each step takes the old one's memory.
        )
        if step == "train":
            self.format = benchmark_inputs.format_for(entry.config)
            return
        if entry.path is not None:
            self.run = load_run(entry.path)
        else:
            config, fmt, mesh = entry.config, benchmark_inputs.format_for(entry.config), sharding.inference_mesh()
            model = build_model(config, fmt)
            shape = (1, config.num_instances, *fmt.input_shape)

            def make(key: jax.Array) -> Any:
                return init_params(model, key, shape, fmt.input_dtype)

            self.run = Run(Path(entry.name), config, fmt, model, born_sharded(make, config.seed, mesh), 0, mesh)
        self.format = self.run.format

    def timed(self, groups: int, batches: int = 1) -> Timed:
        """Compiles for batches of `groups` groups; end to end, a call handles `batches` of them.

        Raises:
          InputError: the devices cannot share the groups equally.
        """
        devices = jax.device_count()
        if groups % devices:
            raise InputError(
                f"{self.entry.name}: {groups} groups a batch do not divide over {devices} devices. Choose groups, or --instances, so "
                "that every batch has a multiple of that."
            )
        return self._training(groups, batches) if self.step == "train" else self._prediction(groups, batches)

    def predictor(self, groups: int) -> Predictor:
        """A predictor with batches of `groups` groups."""
        config = self.run.config.copy_and_resolve_references()
        config.eval.batch_groups = groups
        return Predictor(dataclasses.replace(self.run, config=config))

    def prediction_batch(self, groups: int) -> dict[str, Any]:
        """Full rows `inputs` and `mask` on the mesh, `[B, N, ...]`."""
        fmt, rows = self.format, (groups, self.run.config.num_instances)
        shapes = {
            "inputs": jax.ShapeDtypeStruct(rows + fmt.input_shape, fmt.input_dtype),
            "mask": jax.ShapeDtypeStruct((*rows, fmt.length), "int32"),
        }
        raw = benchmark_inputs.raw_inputs(fmt, groups * self.run.config.num_instances)
        return sharding.put_batch(benchmark_inputs.batch(fmt, raw, shapes), self.run.mesh)

    def _prediction(self, groups: int, batches: int) -> Timed:
        predictor, params = self.predictor(groups), self.run.params
        placed = self.prediction_batch(groups)
        compiled, setup = _compiled(predictor.forward, params, placed)
        # Rows are full, so that texts have this one shape too; another one is refused, not compiled while it is timed.
        predictor.forward = compiled
        device = functools.partial(compiled, params, placed)
        raw = benchmark_inputs.raw_inputs(self.format, predictor.batch_size * batches)
        return Timed(
            {"device": device, "end_to_end": lambda: predictor.logits(raw)},
            {"device": predictor.batch_size, "end_to_end": predictor.batch_size * batches},
            setup,
            seconds_of(device),
            program_bytes(compiled),
            count_params(params),
        )

    def _training(self, groups: int, batches: int) -> Timed:
        config = self.entry.config.copy_and_resolve_references()
        config.batch_groups = groups
        fmt, size = self.format, groups * config.num_instances
        plan = assemble(config, fmt, sharding.make_mesh(config, groups))
        if self.state is None:
            self.state = born_sharded(plan.make, config.seed, plan.mesh)
        raw = [benchmark_inputs.raw_inputs(fmt, size)] * batches

        def placed(inputs: Any) -> Any:
            return sharding.put_batch(benchmark_inputs.batch(fmt, inputs, plan.batch_shapes), plan.mesh)

        first = placed(raw[0])
        compiled, setup = _compiled(plan.jitted_step(), self.state, first)

        def update(arrays: Any) -> Any:
            self.state, sums = compiled(self.state, arrays)
            return sums

        def end_to_end() -> Any:
            pending = None
            for inputs in raw:  # As in training: a step's sums are fetched after the next one was started.
                pending, last = update(placed(inputs)), pending
                jax.device_get(last)
            return jax.device_get(pending)

        device = functools.partial(update, first)
        return Timed(
            {"device": device, "end_to_end": end_to_end},
            {"device": size, "end_to_end": size * batches},
            setup,
            seconds_of(device),
            program_bytes(compiled),
            count_params(self.state.params),
        )


def _compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """The compiled function, and how long tracing and compiling took."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    return compiled, time.perf_counter() - start


def seconds_of(call: Callable[[], Any]) -> float:
    """How long one call takes, its result awaited."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def program_bytes(compiled: Any) -> int | None:
    """Bytes that a compiled program holds at once on a device: arguments, results and temporaries; None where it does not say."""
    used = compiled.memory_analysis()
    if used is None:
        return None
    return int(used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes)
