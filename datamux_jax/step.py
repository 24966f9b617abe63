"""The training state, and the one jitted step that changes it: born sharded, compiled once, donated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from datamux_jax import corruption, sharding
from datamux_jax.build import init_params
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError
from datamux_jax.losses import Sums
from datamux_jax.model import MultiplexedTransformer, Network
from datamux_jax.objectives import Objective

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and the key from which every step's randomness comes."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def state_maker(
    config: Any,
    fmt: Format,
    model: Network,
    tx: Any,
    second: MultiplexedTransformer | None = None,
) -> Callable[[jax.Array], Any]:
    """A function from a random key to a fresh state, boxed with logical axes; for `eval_shape` and for `jit`."""
    shape = (1, config.num_instances, *fmt.input_shape)

    def make(key: jax.Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = init_params(model, init_key, shape, fmt.input_dtype, second)
        return TrainState(jnp.zeros((), "int32"), params, tx.init(params), run_key)

    return make


def placed(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with shardings, of shapes that are boxed with logical axes."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )


def born_sharded(make: Callable[[jax.Array], Any], seed: int, mesh: jax.sharding.Mesh) -> Any:
    """Runs `make` so that every leaf comes into being on its own shard: no device ever holds the whole state."""
    key = jax.random.key(seed)
    where = sharding.shardings(jax.eval_shape(make, key), mesh)
    return jax.jit(lambda k: sharding.unbox(make(k)), out_shardings=where)(key)


def make_step(
    objective: Objective,
    tx: Any,
    state: Any,
    mesh: jax.sharding.Mesh,
    accumulation: int = 1,
    norm: Callable[[Any], jax.Array] = optax.tree.norm,
) -> Any:
    """The jitted training step `(state, batch) -> (state, sums)`; the old state's memory is reused.

    Args:
      objective: what is minimised.
      tx: the optimizer.
      state: the state, or its shapes, with shardings.
      mesh: of devices.
      accumulation: micro-batches that a batch is computed in, one after the other. The update is that of the whole batch: losses are
        divided by the weights of the whole, not of a micro-batch, and corruption is drawn by group.
      norm: of the gradients, for the log.
    """

    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, state)

    def gradients(params: Any, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[Any, Sums]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, rngs, True)
        return grads, sums

    compute = gradients if accumulation == 1 else _accumulated(objective, mesh, accumulation)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(state.key, state.step)
        rngs = {"dropout": jax.random.fold_in(key, 0), "corruption": jax.random.fold_in(key, 1)}
        with sharding.on_mesh(mesh):
            grads, sums = compute(state.params, batch, rngs)
        # Reduced to where the parameters are, each device gets its own part of the gradients alone.
        grads = jax.lax.with_sharding_constraint(grads, state_sharding.params)
        sums = {**sums, "gradient_norm": (norm(grads), jnp.ones(()))}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), sums

    return jax.jit(
        step,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _accumulated(objective: Objective, mesh: jax.sharding.Mesh, count: int) -> Callable[..., tuple[Any, Sums]]:
    """Gradients and sums of a batch, computed in `count` micro-batches."""

    def micro_batches(x: jax.Array) -> jax.Array:
        # Every count-th group: a device's own groups stay on it.
        x = jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(x, sharding.micro_batch_sharding(mesh))

    def compute(params: Any, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[Any, Sums]:
        rngs = {**rngs, "corruption": corruption.group_keys(rngs["corruption"], len(batch["weight"]))}
        # Weights depend on data and draws alone, so the compiler drops the network from this pass over the whole batch.
        whole = objective(params, batch, rngs, True)[1]
        totals = {name: weight.sum() for name, (_, weight) in whole.items()}

        def one(done: Any, micro: tuple[Batch, jax.Array, jax.Array]) -> tuple[Any, None]:
            batch, keys, number = micro
            own = {"dropout": jax.random.fold_in(rngs["dropout"], number), "corruption": keys}
            (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, own, True, totals)
            return jax.tree.map(jnp.add, done, (grads, sums)), None

        micro = (jax.tree.map(micro_batches, dict(batch)), micro_batches(rngs["corruption"]), jnp.arange(count))
        sums = jax.tree.map(jnp.zeros_like, whole)
        return jax.lax.scan(one, (jax.tree.map(jnp.zeros_like, params), sums), micro)[0]

    return compute


class CompiledStep:
    """A step that is compiled beforehand, for batches of given shapes; others are refused, not compiled.

    Args:
      step: the jitted step.
      state: the state that it will be called with.
      batches: a batch, or the shapes and shardings of one, for each length of rows.
    """

    def __init__(self, step: Any, state: Any, *batches: Mapping[str, Any]) -> None:
        self._expected = {_length(batch): _shapes(batch) for batch in batches}
        self._compiled = {_length(batch): step.lower(state, batch).compile() for batch in batches}

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, Sums]:
        """One update.

        Raises:
          InputError: the batch has other arrays, shapes, types or shardings than those that were foreseen.
        """
        length = _length(batch)
        if length not in self._compiled:
            length = next(iter(self._compiled))
        try:
            return self._compiled[length](state, batch)
        except (TypeError, ValueError) as error:
            got, expected = _shapes(batch), self._expected[length]
            different = [
                f"{name}: {expected.get(name, 'absent')} first, {got.get(name, 'absent')} now"
                for name in sorted(got.keys() | expected.keys())
                if got.get(name) != expected.get(name)
            ]
            if not different:
                raise
            raise InputError(
                f"A batch differs from the first one of this run ({'; '.join(different)}), so the step would be compiled again. One "
                "compilation serves a run, or one for each length of rows that is foreseen: let the data source give every batch the "
                "same arrays, shapes and types."
            ) from error


def _length(batch: Mapping[str, Any]) -> int:
    return batch["mask"].shape[-1] if "mask" in batch else 0


def _shapes(batch: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)} {getattr(array.sharding, 'spec', '')}" for name, array in batch.items()}
