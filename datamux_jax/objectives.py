"""Objectives: `(params, batch, rngs, train) -> (loss, sums)`. Table `OBJECTIVES`.

An objective is built from the network, the config and, for ELECTRA, a generator. It puts together terms of `losses.py`, where
batches and sums are described. `rngs` holds the keys `corruption` and, in training, `dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from datamux_jax import corruption, losses
from datamux_jax.layers import Array
from datamux_jax.losses import Batch, Sums, dropout_stream
from datamux_jax.model import MultiplexedTransformer, call

Objective = Callable[[Any, Batch, Mapping[str, Array], bool], tuple[Array, Sums]]


def retrieval(model: MultiplexedTransformer, config: Any, generator: Any = None) -> Objective:
    """Token-retrieval warm-up: nothing but retrieval."""
    del generator

    def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Sums]:
        h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=dropout_stream(rngs, 0))
        drawn = losses.draw_retrieval(model, rngs["corruption"], model.feed(batch["inputs"]), config.retrieval_percentage)
        loss, sums = losses.retrieval_loss(model, params, h, drawn, rngs, train)
        return loss, {**sums, "loss": sums["retrieval_loss"]}

    return objective


def auxiliary_retrieval(model: MultiplexedTransformer, config: Any, *, pads_count: bool = False) -> Callable[..., Any]:
    """A function that adds `retrieval_loss_coeff * retrieval` of the given inputs to a loss, and its sums.

    With a coefficient of 0 it adds nothing, and vocabulary logits are never built.
    """

    def add(
        loss: Array, sums: Sums, inputs: Array, params: Any, h: Array, key: Array, rngs: Mapping[str, Array], train: bool
    ) -> tuple[Array, Sums]:
        if not config.retrieval_loss_coeff:
            return loss, sums
        drawn = losses.draw_retrieval(model, key, model.feed(inputs), config.retrieval_percentage, pads_count=pads_count)
        extra, more = losses.retrieval_loss(model, params, h, drawn, rngs, train)
        return loss + config.retrieval_loss_coeff * extra, {**sums, **more}

    return add


def fine_tuning(task_loss: Any) -> Callable[..., Objective]:
    """`task_loss_coeff * task + retrieval_loss_coeff * retrieval` (DataMUX: 0.9 and 0.1)."""

    def build(model: MultiplexedTransformer, config: Any, generator: Any = None) -> Objective:
        del generator
        with_retrieval = auxiliary_retrieval(model, config)

        def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Sums]:
            h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=dropout_stream(rngs, 0))
            loss, sums = task_loss(model, params, h, batch, rngs, train)
            loss = config.task_loss_coeff * loss
            loss, sums = with_retrieval(loss, sums, batch["inputs"], params, h, rngs["corruption"], rngs, train)
            return loss, {**sums, "loss": _per_example(loss, batch)}

        return objective

    return build


def mlm(model: MultiplexedTransformer, config: Any, generator: Any = None) -> Objective:
    """Masked language modelling, and retrieval of the masked tokens beside it if it has a weight (MUX-PLMs, section 3.3)."""
    del generator
    special = model.tokens
    with_retrieval = auxiliary_retrieval(model, config, pads_count=True)

    def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Sums]:
        assert special is not None, "prepare() refuses feature inputs"
        mask_key, retrieval_key = jax.random.split(rngs["corruption"])
        tokens = batch["inputs"]
        inputs, chosen = corruption.mask_for_mlm(mask_key, tokens, special, model.vocab_size, config.mask_rate)
        chosen &= batch["weight"][..., None] > 0
        h = call(model, params, "encode", inputs, batch["mask"], train, rngs=dropout_stream(rngs, 0))
        room = corruption.capacity(tokens[0].size, config.mask_rate)
        loss, sums, _ = losses.chosen_tokens_loss(model, params, h, tokens, chosen, room, rngs, train)
        loss = config.task_loss_coeff * loss
        loss, sums = with_retrieval(loss, sums, inputs, params, h, retrieval_key, rngs, train)
        return loss, {**sums, "loss": _per_example(loss, batch)}

    return objective


def electra(model: MultiplexedTransformer, config: Any, generator: MultiplexedTransformer | None = None) -> Objective:
    """Replaced-token detection (ELECTRA; MUX-PLMs, section 3.3).

    Every [MASK] is filled by a uniformly random token, or by a sample of `generator`, which learns MLM beside. Loss:
    `generator_loss_coeff * gen + discriminator_loss_coeff * (task_loss_coeff * replaced + retrieval_loss_coeff * retrieval)`.
    """
    special = model.tokens
    with_retrieval = auxiliary_retrieval(model, config, pads_count=True)

    def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Sums]:
        assert special is not None, "prepare() refuses feature inputs"
        mask_key, fill_key, retrieval_key = jax.random.split(rngs["corruption"], 3)
        tokens = batch["inputs"]
        masked, chosen = corruption.mask_for_electra(mask_key, tokens, special, config.mask_rate)
        holes = masked == special.mask
        sums: Sums = {}
        if generator is None:
            filling = jax.random.randint(fill_key, tokens.shape, 0, model.vocab_size, tokens.dtype)
            gen_loss = jnp.zeros(())
            replaced = holes
        else:
            theirs = {**params["generator"]}
            theirs.setdefault("embeddings", params["embeddings"])  # Absent where both share them.
            filling, gen_loss, sums = _generate(generator, theirs, config, batch, masked, chosen, fill_key, train)
            replaced = holes & (filling != tokens)
        inputs = jnp.where(holes, filling, tokens)
        h = call(model, params, "encode", inputs, batch["mask"], train, rngs=dropout_stream(rngs, 0))
        loss, more = losses.replaced_loss(model, params, h, {**batch, "label": replaced}, rngs, train)
        loss, sums = config.task_loss_coeff * loss, {**sums, **more}
        loss, sums = with_retrieval(loss, sums, inputs, params, h, retrieval_key, rngs, train)
        loss = config.generator_loss_coeff * gen_loss + config.discriminator_loss_coeff * loss
        return loss, {**sums, "loss": _per_example(loss, batch)}

    return objective


def _generate(
    generator: MultiplexedTransformer,
    params: Any,
    config: Any,
    batch: Batch,
    masked_BxNxL: Array,
    chosen_BxNxL: Array,
    key: Array,
    train: bool,
) -> tuple[Array, Array, Sums]:
    """Runs ELECTRA's generator.

    Returns:
      The input with a sample at every chosen token, `[B, N, L]`; the generator's loss; and its sums.
    """
    muxed = generator.mux is not None
    arrays = (masked_BxNxL, batch["inputs"], chosen_BxNxL & (batch["weight"][..., None] > 0), batch["mask"])

    def run(arrays: tuple[Array, ...], key: Array) -> tuple[Array, Array, Sums]:
        masked, tokens, chosen, mask = arrays
        sample_key, retrieval_key, dropout_key = jax.random.split(key, 3)
        streams = {"dropout": dropout_key} if train else {}
        h = call(generator, params, "encode", masked, mask, train, rngs=dropout_stream(streams, 0))
        room = corruption.capacity(tokens[0].size, config.mask_rate)
        _, sums, (logits, *pair, weight) = losses.chosen_tokens_loss(generator, params, h, tokens, chosen, room, streams, train)
        at = (jnp.arange(len(masked))[:, None], *pair)
        sampled = corruption.sample_tokens(sample_key, logits).astype(masked.dtype)
        filled = masked.at[at].set(jnp.where(weight > 0, sampled, masked[at]))
        if not (muxed and config.retrieval_loss_coeff):
            return filled, jnp.zeros(()), sums
        drawn = losses.draw_retrieval(generator, retrieval_key, generator.feed(masked), config.retrieval_percentage)
        retrieved, more = losses.retrieval_loss(generator, params, h, drawn, streams, train)
        return filled, retrieved, {**sums, "retrieval_loss": more["retrieval_loss"]}

    if muxed:
        filled, retrieved, sums = run(arrays, key)
    else:  # A plain generator takes every instance by itself.
        alone = tuple(array[:, :, None] for array in arrays)
        keys = jax.random.split(key, masked_BxNxL.shape[1])
        filled, retrieved, sums = jax.vmap(run, in_axes=(1, 0), out_axes=(1, 0, 0))(alone, keys)
        filled = filled[:, :, 0]
    # Of all instances together.
    sums = {f"generator_{name}": (total.sum(), count.sum()) for name, (total, count) in sums.items()}
    total, count = sums["generator_mlm_loss"]
    loss = total / jnp.maximum(count, 1.0)
    if muxed:
        loss = config.task_loss_coeff * loss + config.retrieval_loss_coeff * retrieved
    return filled, loss, sums


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "retrieval": retrieval,
    **{name: fine_tuning(task_loss) for name, task_loss in losses.TASK_LOSSES.items()},
    "mlm": mlm,
    "electra": electra,
}


def _per_example(loss: Array, batch: Batch) -> tuple[Array, Array]:
    examples = batch["weight"].sum()
    return loss * examples, examples
