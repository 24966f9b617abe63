"""Objectives: `(params, batch, rngs, train, totals) -> (loss, sums)`. Table `OBJECTIVES`.

An objective is built from the network, the config and a second network, if it has one: ELECTRA's generator, or the teacher of state
distillation. It puts together terms of `losses.py`, where batches, sums and totals are described. `rngs` holds `corruption`, one key
or one for each group, and in training the key `dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from datamux_jax import corruption, losses
from datamux_jax.layers import Array
from datamux_jax.losses import Batch, Sums, Totals, dropout_stream
from datamux_jax.model import MultiplexedTransformer, Network, call

Rngs = Mapping[str, Array]


class Objective(Protocol):
    """What a training step minimises.

    With `totals`, the weights of all terms in a whole batch, the batch given is one micro-batch of it: losses and gradients of all
    of them add up to those of the whole batch.
    """

    def __call__(
        self, params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None
    ) -> tuple[Array, Sums]: ...


def retrieval(model: MultiplexedTransformer, config: Any, generator: Any = None) -> Objective:
    """Token-retrieval warm-up: nothing but retrieval."""
    del generator

    def objective(params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None) -> tuple[Array, Sums]:
        h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=dropout_stream(rngs, 0))
        keys = corruption.group_keys(rngs["corruption"], len(batch["inputs"]))
        drawn = losses.draw_retrieval(model, keys, model.feed(batch["inputs"]), config.retrieval_percentage)
        sums = losses.retrieval_loss(model, params, h, drawn, rngs, train)
        return losses.mean(sums, "retrieval_loss", totals), {**sums, "loss": sums["retrieval_loss"]}

    return objective


def auxiliary_retrieval(model: Network, config: Any, *, pads_count: bool = False) -> Callable[..., Sums]:
    """A function of `(inputs, params, h, keys, rngs, train)`: the sums of retrieval of the given inputs beside a task.

    With a coefficient of 0 there are none, and vocabulary logits are never built.
    """

    def sums(inputs: Array, params: Any, h: Array, keys_B: Array, rngs: Rngs, train: bool) -> Sums:
        if not config.retrieval_loss_coeff:
            return {}
        assert isinstance(model, MultiplexedTransformer), "validate() refuses others"
        drawn = losses.draw_retrieval(model, keys_B, model.feed(inputs), config.retrieval_percentage, pads_count=pads_count)
        return losses.retrieval_loss(model, params, h, drawn, rngs, train)

    return sums


def weighted(config: Any, sums: Sums, task: str, retrieval: str, totals: Totals | None) -> Array:
    """`task_loss_coeff * task + retrieval_loss_coeff * retrieval`, the latter if it is there.

    Where a teacher is, the task's loss is `(1 - w) * task + w * distillation`.
    """
    loss = losses.mean(sums, task, totals)
    if "distill_loss" in sums:
        share = config.distill.weight
        loss = (1 - share) * loss + share * losses.mean(sums, "distill_loss", totals)
    loss *= config.task_loss_coeff
    if retrieval in sums:
        loss += config.retrieval_loss_coeff * losses.mean(sums, retrieval, totals)
    return loss


def fine_tuning(model: Network, config: Any, generator: Any = None) -> Objective:
    """`task_loss_coeff * task + retrieval_loss_coeff * retrieval` (DataMUX: 0.9 and 0.1); the task's loss may have a teacher."""
    del generator
    task_loss = losses.task_loss(config)
    retrieve = auxiliary_retrieval(model, config)

    def objective(params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None) -> tuple[Array, Sums]:
        h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=dropout_stream(rngs, 0))
        sums, outputs = task_loss(model, params, h, batch, rngs, train)
        if losses.has_teacher(config):
            sums |= losses.distillation_loss(outputs, batch, config.distill.temperature)
        keys = corruption.group_keys(rngs["corruption"], len(batch["inputs"]))
        sums |= retrieve(batch["inputs"], params, h, keys, rngs, train)
        return _with_loss(weighted(config, sums, "task_loss", "retrieval_loss", totals), sums, batch, totals)

    return objective


def teacher_states(teacher: MultiplexedTransformer, params: Any, batch: Batch) -> Array:
    """What a plain network has after each layer, of every instance by itself: `[layers, B, N, L, D]`."""
    alone = [batch[name].reshape(-1, 1, batch[name].shape[2]) for name in ("inputs", "mask")]
    known = call(teacher, params, "encode_layers", *alone)
    return known.reshape(len(known), *batch["inputs"].shape, -1)


def states(model: MultiplexedTransformer, config: Any, teacher: MultiplexedTransformer | None = None) -> Objective:
    """State distillation: the hidden states of a plain network, layer by layer, and token retrieval beside it.

    `task_loss_coeff * (last layer + distill.layers * layers below) + retrieval_loss_coeff * retrieval`. The teacher reads every
    instance by itself; its parameters stand beside those of the network, and get no gradient.
    """
    assert teacher is not None, "build_second() gives one"
    retrieve = auxiliary_retrieval(model, config)

    def objective(params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None) -> tuple[Array, Sums]:
        inputs = batch["inputs"]
        known = teacher_states(teacher, jax.lax.stop_gradient(params["teacher"]), batch)
        h = call(model, params, "encode_layers", inputs, batch["mask"], train, rngs=dropout_stream(rngs, 0))
        state_keys, retrieval_keys = corruption.split(corruption.group_keys(rngs["corruption"], len(inputs)), 2)
        sums = losses.states_loss(model, params, h, known, batch, state_keys, rngs, train)
        loss = losses.mean(sums, "state_loss", totals)
        if "layer_loss" in sums:
            loss += config.distill.layers * losses.mean(sums, "layer_loss", totals)
        loss *= config.task_loss_coeff
        if found := retrieve(inputs, params, h[-1], retrieval_keys, rngs, train):
            sums |= found
            loss += config.retrieval_loss_coeff * losses.mean(sums, "retrieval_loss", totals)
        return _with_loss(loss, sums, batch, totals)

    return objective


def mlm(model: MultiplexedTransformer, config: Any, generator: Any = None) -> Objective:
    """Masked language modelling, and retrieval of the masked tokens beside it if it has a weight (MUX-PLMs, section 3.3)."""
    del generator
    special = model.tokens
    retrieve = auxiliary_retrieval(model, config, pads_count=True)

    def objective(params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None) -> tuple[Array, Sums]:
        assert special is not None, "prepare() refuses feature inputs"
        tokens = batch["inputs"]
        mask_keys, retrieval_keys = corruption.split(corruption.group_keys(rngs["corruption"], len(tokens)), 2)
        inputs, chosen = corruption.mask_for_mlm(mask_keys, tokens, special, model.vocab_size, config.mask_rate)
        chosen &= batch["weight"][..., None] > 0
        h = call(model, params, "encode", inputs, batch["mask"], train, rngs=dropout_stream(rngs, 0))
        room = corruption.capacity(tokens[0].size, config.mask_rate)
        sums, _ = losses.chosen_tokens_loss(model, params, h, tokens, chosen, room, rngs, train)
        sums |= retrieve(inputs, params, h, retrieval_keys, rngs, train)
        return _with_loss(weighted(config, sums, "mlm_loss", "retrieval_loss", totals), sums, batch, totals)

    return objective


def electra(model: MultiplexedTransformer, config: Any, generator: MultiplexedTransformer | None = None) -> Objective:
    """Replaced-token detection (ELECTRA; MUX-PLMs, section 3.3).

    Every [MASK] is filled by a uniformly random token, or by a sample of `generator`, which learns MLM beside. Loss:
    `generator_loss_coeff * gen + discriminator_loss_coeff * (task_loss_coeff * replaced + retrieval_loss_coeff * retrieval)`.
    """
    special = model.tokens
    retrieve = auxiliary_retrieval(model, config, pads_count=True)

    def objective(params: Any, batch: Batch, rngs: Rngs, train: bool, totals: Totals | None = None) -> tuple[Array, Sums]:
        assert special is not None, "prepare() refuses feature inputs"
        tokens = batch["inputs"]
        mask_keys, fill_keys, keys = corruption.split(corruption.group_keys(rngs["corruption"], len(tokens)), 3)
        masked, chosen = corruption.mask_for_electra(mask_keys, tokens, special, config.mask_rate)
        holes = masked == special.mask
        sums: Sums = {}
        loss = jnp.zeros(())
        if generator is None:
            filling = corruption.draw_tokens(fill_keys, tokens, model.vocab_size)
            replaced = holes
        else:
            theirs = {**params["generator"]}
            theirs.setdefault("embeddings", params["embeddings"])  # Absent where both share them.
            filling, sums = _generate(generator, theirs, config, batch, masked, chosen, fill_keys, rngs, train)
            loss = _generator_loss(generator, config, sums, totals)
            replaced = holes & (filling != tokens)
        inputs = jnp.where(holes, filling, tokens)
        h = call(model, params, "encode", inputs, batch["mask"], train, rngs=dropout_stream(rngs, 0))
        sums |= losses.replaced_loss(model, params, h, {**batch, "label": replaced}, rngs, train)
        sums |= retrieve(inputs, params, h, keys, rngs, train)
        discriminator = weighted(config, sums, "task_loss", "retrieval_loss", totals)
        loss = config.generator_loss_coeff * loss + config.discriminator_loss_coeff * discriminator
        return _with_loss(loss, sums, batch, totals)

    return objective


def _generator_loss(generator: MultiplexedTransformer, config: Any, sums: Sums, totals: Totals | None) -> Array:
    if generator.mux is None:
        return losses.mean(sums, "generator_mlm_loss", totals)
    return weighted(config, sums, "generator_mlm_loss", "generator_retrieval_loss", totals)


def _generate(
    generator: MultiplexedTransformer,
    params: Any,
    config: Any,
    batch: Batch,
    masked_BxNxL: Array,
    chosen_BxNxL: Array,
    keys_B: Array,
    rngs: Rngs,
    train: bool,
) -> tuple[Array, Sums]:
    """Runs ELECTRA's generator.

    Returns:
      The input with a sample at every chosen token, `[B, N, L]`; and the generator's sums.
    """
    muxed = generator.mux is not None
    arrays = (masked_BxNxL, batch["inputs"], chosen_BxNxL & (batch["weight"][..., None] > 0), batch["mask"])

    def run(arrays: tuple[Array, ...], keys_B: Array, number: Array) -> tuple[Array, Sums]:
        masked, tokens, chosen, mask = arrays
        sample_keys, retrieval_keys = corruption.split(keys_B, 2)
        # A stream apart from the discriminator's, and one for every pass of a plain generator.
        streams = {"dropout": jax.random.fold_in(dropout_stream(rngs, 3)["dropout"], number)} if train else {}
        h = call(generator, params, "encode", masked, mask, train, rngs=dropout_stream(streams, 0))
        room = corruption.capacity(tokens[0].size, config.mask_rate)
        sums, (sampled, *pair, weight) = losses.chosen_tokens_loss(
            generator, params, h, tokens, chosen, room, streams, train, sample_keys
        )
        at = (jnp.arange(len(masked))[:, None], *pair)
        filled = masked.at[at].set(jnp.where(weight > 0, sampled.astype(masked.dtype), masked[at]))
        if muxed and config.retrieval_loss_coeff:
            drawn = losses.draw_retrieval(generator, retrieval_keys, generator.feed(masked), config.retrieval_percentage)
            sums["retrieval_loss"] = losses.retrieval_loss(generator, params, h, drawn, streams, train)["retrieval_loss"]
        return filled, sums

    if muxed:
        filled, sums = run(arrays, keys_B, jnp.zeros((), int))
    else:  # A plain generator takes every instance by itself.
        instances = masked_BxNxL.shape[1]
        alone = tuple(array[:, :, None] for array in arrays)
        keys_NxB = corruption.split(keys_B, instances)
        filled, sums = jax.vmap(run, in_axes=(1, 0, 0), out_axes=(1, 0))(alone, keys_NxB, jnp.arange(instances))
        filled = filled[:, :, 0]
    # Of all instances together.
    return filled, {f"generator_{name}": (total.sum(), count.sum()) for name, (total, count) in sums.items()}


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "retrieval": retrieval,
    **dict.fromkeys(losses.TASK_LOSSES, fine_tuning),
    "mlm": mlm,
    "electra": electra,
    "states": states,
}


def _with_loss(loss: Array, sums: Sums, batch: Batch, totals: Totals | None) -> tuple[Array, Sums]:
    """Adds the loss to the sums, by examples; those of micro-batches add up to that of the whole batch."""
    examples = batch["weight"].sum()
    whole = examples if totals is None else totals["loss"]
    return loss, {**sums, "loss": (loss * whole, examples)}
