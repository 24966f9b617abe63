"""What a step would need on a machine that is not there: compiled ahead of time for a TPU topology, never run.

The step is the one that a real run jits, built on the same path; data and checkpoints are not needed. Numbers are estimates, mostly
the compiler's own; none is measured. Without libtpu what the shardings and the shapes tell is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from datamux_jax import flops, inference, predict, scoring, sharding
from datamux_jax.build import count_params
from datamux_jax.config import validate
from datamux_jax.data.corpus import CORPORA
from datamux_jax.data.formats import Format
from datamux_jax.data.pipeline import format_of
from datamux_jax.data.subword_models import TRAINERS
from datamux_jax.data.tokenizers import tokens_behind
from datamux_jax.errors import InputError, choose
from datamux_jax.plan import Plan, assemble
from datamux_jax.program import Collective, Program
from datamux_jax.refusal import refusal
from datamux_jax.topology import NoCompiler, Topology, devices_of

BY_CYCLES = "the compiler's cycles"
BY_ROOFLINE = "roofline of operations and bytes"


@dataclasses.dataclass(frozen=True)
class Times:
    """Estimated seconds of one step.

    Attributes:
      total: computation and what communication is not hidden behind it.
      computing: the sum of the compiler's cycles over the schedule, loops multiplied, by the clock, and for instructions without
        (gathers, sorts) their results, written and read once at the speed of the memory; or a roofline.
      waiting: communication that nothing overlaps.
      overlapped: communication while other work runs.
      optimal: the compiler's `optimal_seconds`, the sum over instructions of the larger of operations by peak and bytes by memory
        speed; None for programs with loops, whose bodies it counts once.
      source: `BY_CYCLES` or `BY_ROOFLINE`: where `computing` comes from.
    """

    total: float
    computing: float
    waiting: float
    overlapped: float
    optimal: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one device.

    Attributes:
      devices: number of devices.
      instances: that a step handles, all devices together.
      memory: bytes a device needs, by what for, and `total`.
      capacity: bytes that a device has; None where it is not known.
      flops: floating-point operations of the matrix products on a device, what is computed again included.
      times: None if nothing gives a time.
      collectives: communication, largest first.
      positions: of an example.
      parameters: of the network, all devices together, each once.
      compiled: False for what is known without a compiler: `memory` is that of parameters, optimizer and batch alone, and `flops`
        those of the model.
      uncounted_loops: loops of which one pass is counted, for the program does not say how many there are.
    """

    devices: int
    instances: int
    memory: dict[str, int]
    capacity: int | None
    flops: float
    times: Times | None
    collectives: list[Collective]
    positions: int = 0
    parameters: int = 0
    compiled: bool = True
    uncounted_loops: int = 0

    @property
    def left(self) -> int:
        """Bytes that are left on a device; below 0, those that lack. 0 where the capacity is not known."""
        return self.capacity - self.memory["total"] if self.capacity else 0

    @property
    def rate(self) -> float | None:
        """Instances a second, all devices together."""
        return self.instances / self.times.total if self.times else None


@dataclasses.dataclass(frozen=True)
class Step:
    """A kind of step.

    Attributes:
      mesh: of the devices, for a config; `launch.train` follows `config.mesh`, the others put all devices along `data`.
      groups: of a batch.
      function: the jitted function and its arguments, as shapes with shardings.
      flops: of the model, all devices together.
    """

    mesh: Callable[[Any, Any], Any]
    groups: Callable[[Plan], int]
    function: Callable[[Plan], tuple[Any, tuple[Any, ...]]]
    flops: Callable[[Plan], float]


def _key_shape() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _evaluation(plan: Plan) -> tuple[Any, tuple[Any, ...]]:
    batch = {name: shape for name, shape in plan.shapes_of(_eval_groups(plan)).items() if name != "teacher"}
    return scoring.scoring_step(plan.config, plan.model, plan.second), (plan.abstract.params, batch, _key_shape())


def _prediction(plan: Plan) -> tuple[Any, tuple[Any, ...]]:
    batch = plan.shapes_of(_eval_groups(plan))
    objective = plan.config.objective
    return predict.forward(plan.model, objective), (plan.abstract.params, {name: batch[name] for name in ("inputs", "mask")})


def _eval_groups(plan: Plan) -> int:
    return sharding.eval_groups(plan.config, plan.mesh)


def _forward_flops(function: Callable[[Plan], tuple[Any, tuple[Any, ...]]]) -> Callable[[Plan], float]:
    def count(plan: Plan) -> float:
        call, args = function(plan)
        return flops.matmul_flops(call, *args)

    return count


def _all_data(config: Any, devices: Any) -> Any:
    del config
    return sharding.inference_mesh(devices)


STEPS = {
    "train": Step(
        lambda config, devices: sharding.make_mesh(config, config.batch_groups, devices),
        lambda plan: plan.config.batch_groups,
        lambda plan: (plan.jitted_step(), (plan.abstract, plan.batch_shapes)),
        lambda plan: plan.model_flops(),
    ),
    "evaluate": Step(_all_data, _eval_groups, _evaluation, _forward_flops(_evaluation)),
    "predict": Step(_all_data, _eval_groups, _prediction, _forward_flops(_prediction)),
}


def check(config: Any, step: str, topology: Topology) -> None:
    """Checks, before anything is built, that a step of `config` can be planned for a machine.

    Raises:
      InputError: the config does not fit itself, its mesh or batch not the machine, or it has no such step.
    """
    validate(config)
    choose(STEPS, step, "The step --step=")
    data = mesh_sizes(config, step, topology)[0]
    if data % topology.slices:
        raise InputError(
            f"mesh.data = {data} does not divide over --slices={topology.slices}. Slices are connected by a slow network, which only "
            f"the axis data crosses: make it a multiple of {topology.slices}."
        )
    if step == "predict" and config.objective not in inference.OBJECTIVES:
        raise InputError(
            f"--step=predict needs a task, but objective = {config.objective!r} has no predictions. Plan a config of "
            f"{', '.join(inference.OBJECTIVES)}, or --step=train or evaluate."
        )


def mesh_sizes(config: Any, step: str, topology: Topology) -> tuple[int, ...]:
    """Sizes of the mesh `(data, fsdp, tensor)` of a step on a machine.

    Raises:
      InputError: the mesh of a training step, or its batch, does not fit the machine.
    """
    if step != "train":
        return topology.devices, 1, 1
    return sharding.mesh_sizes(config, config.batch_groups, topology.devices)


def plan_for(config: Any, topology: Topology, step: str = "train") -> Plan:
    """A plan on devices that are not there; without libtpu, on a mesh without devices.

    Running text need not be there either: a trained vocabulary is as large as asked for.

    Raises:
      InputError: the config does not fit itself, or the machine.
    """
    check(config, step, topology)
    try:
        mesh = STEPS[step].mesh(config, devices_of(topology))
    except NoCompiler:
        mesh = sharding.abstract_mesh(mesh_sizes(config, step, topology))
    return assemble(config, _format(config), mesh)


def _format(config: Any) -> Format:
    data = config.data
    if data.source not in CORPORA or data.tokenizer not in TRAINERS:
        return format_of(config)
    tokens, size = tokens_behind(data.vocab_size, config.num_instances, pad=0, cls=1, sep=2, mask=3)
    return Format((), data.length, vocab_size=size if config.demux.name == "index" else data.vocab_size, tokens=tokens)


def estimate(plan: Plan, topology: Topology | None = None, step: str = "train") -> Estimate:
    """Compiles a step of a plan for its devices; if there are none, reckons what is known without a compiler.

    Args:
      plan: from `plan_for`.
      topology: the machine; None for devices that are there, of which capacity and speed are not known.
      step: key of `STEPS`.

    Raises:
      OutOfMemory: the step does not fit into memory.
      InputError: the compiler refuses the step for another reason.
    """
    if isinstance(plan.mesh, jax.sharding.AbstractMesh):
        return _uncompiled(plan, topology, step)
    function, args = STEPS[step].function(plan)
    # Evaluation is traced for the mesh by its caller, the training step by itself.
    with sharding.on_mesh(plan.mesh) if step == "evaluate" else contextlib.nullcontext():
        lowered = function.lower(*args)
    try:
        with _no_cache():
            compiled, text = _compiled(lowered, topology)
    except jax.errors.JaxRuntimeError as error:
        raise refusal(error, topology) from error
    used = compiled.memory_analysis()
    memory = {
        _arguments(step): used.argument_size_in_bytes,
        "activations and temporaries": used.temp_size_in_bytes,
        "outputs": used.output_size_in_bytes - used.alias_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    program = Program.read(text)
    found = program.collectives()
    return Estimate(
        **_about(plan, topology, step),
        memory=memory,
        flops=program.flops(),
        times=_times(program, compiled.cost_analysis() or {}, found, topology) if topology else None,
        collectives=found,
        uncounted_loops=program.uncounted(),
    )


def _compiled(lowered: Any, topology: Topology | None) -> tuple[Any, str]:
    """The compiled program and its text.

    The text is the one that libtpu itself writes, if it does: jaxlib refuses to read some of its programs (of libtpu 0.0.52 those with
    gathers on the SparseCores of v5p). Where both are there they say the same.

    Raises:
      JaxRuntimeError: the compiler refuses the program, or there is no text.
    """
    with tempfile.TemporaryDirectory(prefix="datamux-jax-plan-") as folder:
        written = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if topology else None
        compiled = lowered.compile(compiler_options=written)
        files = list(Path(folder).glob("*.after_codegen.txt"))
        return compiled, files[0].read_text(encoding="utf-8") if len(files) == 1 else compiled.as_text()


def _arguments(step: str) -> str:
    """What the memory of a step's arguments is for."""
    return "parameters, optimizer and batch" if step == "train" else "parameters and batch"


def _about(plan: Plan, topology: Topology | None, step: str) -> dict[str, Any]:
    """What an estimate says of a step, compiled or not."""
    return {
        "devices": plan.mesh.size,
        "instances": STEPS[step].groups(plan) * plan.config.num_instances,
        "capacity": topology.chip.memory if topology else None,
        "positions": plan.format.length,
        "parameters": count_params(plan.abstract.params),
    }


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Turns JAX's cache of compiled programs off: one for a machine that is not there cannot be read back."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # It remembers whether it is used.
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _times(program: Program, cost: dict[str, float], communication: list[Collective], topology: Topology) -> Times | None:
    """The best available guess of the time: cycles; a roofline, where the program has none."""
    chip = topology.chip
    waits = {
        overlapped: sum(
            one.seconds(topology.link_speed, chip.slice_speed) for one in communication if one.overlapped == overlapped
        )
        for overlapped in (True, False)
    }
    optimal = None
    if "optimal_seconds" in cost and not program.loops():
        optimal = cost["optimal_seconds"] + program.unknown()
    cycles = program.cycles()
    computing, source = cycles / chip.clock + 2 * program.unpriced_bytes() / chip.memory_speed, BY_CYCLES
    if not cycles:
        moved = cost["bytes accessed"] / chip.memory_speed if "bytes accessed" in cost else 0.0
        computing, source = max(program.flops() / chip.flops, moved), BY_ROOFLINE
    total = max(computing, waits[True]) + waits[False]
    return Times(total, computing, waits[False], waits[True], optimal, source) if total else None


def _uncompiled(plan: Plan, topology: Topology | None, step: str) -> Estimate:
    """What shapes and shardings alone tell."""
    arguments = STEPS[step].function(plan)[1]

    def held(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * (8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)

    size = sum(held(leaf) for leaf in jax.tree.leaves(arguments))
    return Estimate(
        **_about(plan, topology, step),
        memory={_arguments(step): size, "total": size},
        flops=STEPS[step].flops(plan) / plan.mesh.size,
        times=None,
        collectives=[],
        compiled=False,
    )
