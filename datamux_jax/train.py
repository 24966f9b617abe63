"""The trainer: state, step and loop. Warm-up, pre-training and fine-tuning differ in objective and config only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from datamux_jax import checkpoint, optimizer, sharding, workdir
from datamux_jax.build import build, build_generator, init_params
from datamux_jax.config import validate
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError, Interrupted, choose
from datamux_jax.metrics_log import MetricsLog
from datamux_jax.model import MultiplexedTransformer
from datamux_jax.objectives import OBJECTIVES, Objective
from datamux_jax.progress import Progress

FORMAT = "format.json"


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and the key from which every step's randomness comes."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def build_model(config: Any, fmt: pipeline.Format) -> MultiplexedTransformer:
    """The network of `config` for data of the format `fmt`."""
    return build(config, num_classes=len(fmt.label_names), vocab_size=fmt.vocab_size, max_length=fmt.length, tokens=fmt.tokens)


def state_maker(
    config: Any,
    fmt: pipeline.Format,
    model: MultiplexedTransformer,
    tx: Any,
    generator: MultiplexedTransformer | None = None,
) -> Callable[[jax.Array], Any]:
    """A function from a random key to a fresh state, boxed with logical axes; for `eval_shape` and for `jit`."""
    shape = (1, config.num_instances, *fmt.input_shape)

    def make(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = init_params(model, init_key, shape, fmt.input_dtype, generator)
        return TrainState(jax.numpy.zeros((), "int32"), params, tx.init(params), run_key)

    return make


def born_sharded(make: Callable[[jax.Array], Any], seed: int, mesh: jax.sharding.Mesh) -> Any:
    """Runs `make` so that every leaf comes into being on its own shard: no device ever holds the whole state."""
    key = jax.random.key(seed)
    placed = sharding.shardings(jax.eval_shape(make, key), mesh)
    return jax.jit(lambda k: sharding.unbox(make(k)), out_shardings=placed)(key)


def make_step(objective: Objective, tx: Any, state: TrainState, mesh: jax.sharding.Mesh) -> Any:
    """The jitted training step `(state, batch) -> (state, sums)`; the old state's memory is reused."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(state.key, state.step)
        rngs = {"dropout": jax.random.fold_in(key, 0), "corruption": jax.random.fold_in(key, 1)}
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(state.params, batch, rngs, True)
        sums = {**sums, "gradient_norm": (optax.tree.norm(grads), jax.numpy.ones(()))}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), sums

    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is known to be possible: config, data, network and mesh fit together. Nothing is written or computed yet."""

    config: Any
    mesh: jax.sharding.Mesh
    format: pipeline.Format
    arrays: pipeline.Arrays
    model: MultiplexedTransformer
    generator: MultiplexedTransformer | None
    tx: Any
    make: Callable[[jax.Array], TrainState]

    @property
    def abstract(self) -> TrainState:
        """Shapes of the state."""
        return jax.eval_shape(lambda key: sharding.unbox(self.make(key)), jax.random.key(0))

    @property
    def needed_bytes(self) -> int:
        """Disk that the run's checkpoints take: those kept and the one being written; and some room for the rest."""
        state = sum(leaf.size * 4 for leaf in jax.tree.leaves(self.abstract))
        return state * (self.config.checkpoint.keep + 1) + 20_000_000


def prepare(config: Any) -> Plan:
    """Checks the config against itself, the data and this machine.

    Raises:
      InputError: something does not fit.
    """
    validate(config)
    mesh = sharding.make_mesh(config, config.batch_groups)
    fmt, splits = pipeline.load(config)
    for key in ("data.train_split", "eval.split"):
        section, name = key.split(".")
        choose(splits, config[section][name], f"The split {key} =")
    _check_data(config, fmt)
    model = build_model(config, fmt)
    generator = build_generator(config, model)
    tx = optimizer.make(config)
    make = state_maker(config, fmt, model, tx, generator)
    plan = Plan(config, mesh, fmt, splits[config.data.train_split], model, generator, tx, make)
    sharding.check_divides(jax.eval_shape(plan.make, jax.random.key(0)), mesh)
    return plan


def _check_data(config: Any, fmt: pipeline.Format) -> None:
    """Raises InputError if the data have not what the objective needs."""
    needs_tokens = config.objective in ("retrieval", "mlm", "electra")
    if not fmt.vocab_size and (needs_tokens or config.retrieval_loss_coeff):
        raise InputError(
            f"objective = {config.objective!r} with retrieval_loss_coeff = {config.retrieval_loss_coeff} needs tokens, but the data "
            f"source {config.data.source!r} has feature vectors. Use a text source, or classification without retrieval."
        )
    if config.objective == "tagging" and not fmt.token_labels:
        raise InputError(
            f"objective = 'tagging' needs a label for every token, but the data source {config.data.source!r} has one for an example. "
            "Use 'classification', or a tagging source."
        )
    if config.objective == "regression" and fmt.label_names:
        raise InputError(
            f"objective = 'regression' predicts a number, but the labels of {config.data.source!r} are classes. Use 'classification'."
        )
    if config.demux.prefix == "cut" and config.demux.name == "index" and fmt.length <= config.num_instances + 1:
        raise InputError(
            f"demux.prefix = 'cut' takes num_instances + 1 = {config.num_instances + 1} of the data.length = {fmt.length} positions, "
            "which leaves none. Raise data.length, or use demux.prefix = 'extend'."
        )


def train(config: Any, run: Path, *, label: str = "train") -> None:
    """Trains the run that `config` describes in the folder `run`, from wherever it stands; returns at once if it is done.

    Start precedence: the folder's own checkpoint, then `config.resume`, then `config.init_from`, then scratch.

    Raises:
      InputError: the config, the data, the folder or the run to start from is wrong; nothing has been written then.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    plan = prepare(config)
    done = checkpoint.newest_step(run)
    if done is None:
        _check_start(plan, run)
    workdir.claim(run, config, needed_bytes=0 if done == config.steps else plan.needed_bytes)
    if done == config.steps:
        return
    with workdir.lock(run):
        workdir.write_json(run / FORMAT, plan.format.to_json())
        data = pipeline.train_iterator(
            plan.arrays,
            groups=config.batch_groups,
            instances=config.num_instances,
            seed=config.seed,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        with contextlib.closing(checkpoint.Checkpoints(run, config.checkpoint.keep)) as saves:
            fresh = born_sharded(plan.make, config.seed, plan.mesh)
            state = initial_state(config, run, saves, fresh, data)
            step = make_step(OBJECTIVES[config.objective](plan.model, config, plan.generator), plan.tx, state, plan.mesh)
            _loop(config, run, label, state, step, data, saves, plan.mesh)


def _check_start(plan: Plan, run: Path) -> None:
    """Raises InputError if the run named by `resume` or `init_from` is missing or does not fit, before anything is written."""
    config = plan.config
    if config.resume:
        source = checkpoint.find_run(config.resume, run)
        checkpoint.check_resumable(source)
        checkpoint.match(source, plan.abstract.params, "resume", fresh=())
        at = checkpoint.newest_step(source)
        if at is not None and at >= config.steps:
            raise InputError(
                f"resume = {str(source)!r} stands at step {at}, so nothing is left to do with steps = {config.steps}. Raise steps, or "
                "use init_from to start another training from its parameters."
            )
    elif config.init_from:
        source = checkpoint.find_run(config.init_from, run)
        checkpoint.match(source, plan.abstract.params)
        _check_same_function(config, source)


# Parameters of equal shapes mean something else where these differ.
MEANING = ("model.family", "model.layer_norm_eps", "mux.name", "demux.name", "demux.form")


def _check_same_function(config: Any, source: Path) -> None:
    """Raises InputError if the parameters of the run in `source` would compute something else under `config`."""
    ours, theirs = (workdir.flatten(workdir.plain(one)) for one in (config, workdir.load_config(source)))
    from_plain = theirs["mux.name"] == "none"
    different = [
        f"{key} = {theirs[key]!r} there, {ours[key]!r} here"
        for key in MEANING
        if ours[key] != theirs[key]
        and not (from_plain and key.startswith(("mux.", "demux.")))
        and not (key == "demux.form" and ours["demux.name"] != "rsa")
    ]
    if different:
        raise InputError(
            f"init_from = {str(source)!r} has the right shapes, but would compute something else: {'; '.join(different)}. "
            "Set these keys as they are there."
        )


def initial_state(config: Any, run: Path, saves: checkpoint.Checkpoints, fresh: TrainState, data: Any) -> TrainState:
    """Where a run starts: its own newest checkpoint, else `resume` (whole state), else `init_from` (parameters), else fresh."""

    def restored(source: checkpoint.Checkpoints) -> TrainState:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
        params, rest = source.restore(abstract.params, _rest(abstract), data)
        return dataclasses.replace(fresh, params=params, **rest)

    if saves.latest_step is not None:
        return restored(saves)
    if config.resume:
        return restored(checkpoint.run_checkpoints(checkpoint.find_run(config.resume, run)))
    if config.init_from:
        source = checkpoint.find_run(config.init_from, run)
        params, left = checkpoint.init_from(source, fresh.params)
        print(f"{run.name}: starts from {source}{left}", flush=True)
        return dataclasses.replace(fresh, params=params)
    return fresh


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _loop(
    config: Any,
    run: Path,
    label: str,
    state: TrainState,
    step: Any,
    data: Any,
    saves: checkpoint.Checkpoints,
    mesh: jax.sharding.Mesh,
) -> None:
    done = int(state.step)
    saved = done
    log = MetricsLog(run / "metrics.jsonl", done, config)
    progress = Progress(label, config.steps, done)
    pending = None
    with stop_signals() as stop, contextlib.closing(progress):
        while done < config.steps and not stop():
            state, sums = step(state, sharding.put_batch(next(data), mesh))
            if pending is not None:
                # One step late: the device already works on the next step while these numbers travel.
                progress.update(done, log.add(done, jax.device_get(pending)))
            elif done + 1 < config.steps:
                jax.block_until_ready(sums)  # The first step compiles; the clock starts after it.
                progress.restart_clock(done + 1)
                log.restart_clock(done + 1)
            pending, done = sums, done + 1
            if done % config.checkpoint.every == 0 and done < config.steps:
                log.check(jax.device_get(pending), done)
                saves.save(done, state.params, _rest(state), data)
                saved = done
        if pending is not None:
            progress.update(done, log.add(done, jax.device_get(pending)))
    if done > saved:
        saves.save(done, state.params, _rest(state), data)
    saves.wait()
    if done < config.steps:
        raise Interrupted(f"Stopped at step {done} of {config.steps}; the state is saved. The same command goes on from there.")


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While active, SIGINT and SIGTERM ask for a stop instead of causing one; a second SIGINT does what it always did.

    Outside the main thread (notebook workers, tests) signals are left alone.
    """
    received: list[int] = []
    old: dict[int, Any] = {}

    def handler(old: dict[int, Any], number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1 and callable(old[number]):
            old[number](number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, functools.partial(handler, old))
    try:
        yield lambda: bool(received)
    finally:
        for restored, previous in old.items():
            signal.signal(restored, previous)
