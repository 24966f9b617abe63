"""Objectives: `(params, batch, rngs, train) -> (loss, sums)`. Table `OBJECTIVES`.

A batch is a dict of arrays: `inputs` `[B, N, L]` or `[B, N, L, F]`, `mask` `[B, N, L]`, `label` `[B, N]` and `weight` `[B, N]`, which
is 0 for rows that only fill up a group. Sums are described in `metrics.py`; accuracies have one entry an instance slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from datamux_jax.corruption import retrieval_targets
from datamux_jax.layers import Array
from datamux_jax.model import MultiplexedTransformer, call

Batch = Mapping[str, Array]
Objective = Callable[[Any, Batch, Mapping[str, Array], bool], tuple[Array, dict[str, tuple[Array, Array]]]]


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of `values` under `weights`; 0 if all weights are 0, so that an empty batch has no gradient."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def retrieval_loss(
    model: MultiplexedTransformer,
    params: Any,
    h_BxLxD: Array,
    batch: Batch,
    rngs: Mapping[str, Array],
    train: bool,
    share: float,
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Token retrieval on hidden states that exist already: cross-entropy over the vocabulary (DataMUX, section 3.3)."""
    real = batch["mask"] * batch["weight"][..., None].astype(batch["mask"].dtype)
    instance, target, weight = retrieval_targets(rngs["corruption"], batch["inputs"], real, share)
    logits = call(model, params, "retrieve", h_BxLxD, instance, train, rngs=_dropout(rngs, 1))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    right = (logits.argmax(-1) == target) * weight
    slot = jax.nn.one_hot(instance, batch["inputs"].shape[1])
    sums = {
        "retrieval_loss": ((loss * weight).sum(), weight.sum()),
        "retrieval_accuracy": (jnp.einsum("bl,bln->n", right, slot), jnp.einsum("bl,bln->n", weight, slot)),
    }
    return weighted_mean(loss, weight), sums


def task_loss(
    model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Cross-entropy of sequence classification, mean over all instances of all groups."""
    logits = call(model, params, "classify", h_BxLxD, batch["mask"], train, rngs=_dropout(rngs, 2))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    weight = batch["weight"]
    right = (logits.argmax(-1) == batch["label"]) * weight
    sums = {"task_loss": ((loss * weight).sum(), weight.sum()), "accuracy": (right.sum(0), weight.sum(0))}
    return weighted_mean(loss, weight), sums


def retrieval(model: MultiplexedTransformer, config: Any) -> Objective:
    """Token-retrieval warm-up: nothing but retrieval."""

    def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Any]:
        h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=_dropout(rngs, 0))
        loss, sums = retrieval_loss(model, params, h, batch, rngs, train, config.retrieval_percentage)
        return loss, {**sums, "loss": sums["retrieval_loss"]}

    return objective


def classification(model: MultiplexedTransformer, config: Any) -> Objective:
    """Fine-tuning: `task_loss_coeff * task + retrieval_loss_coeff * retrieval` (DataMUX: 0.9 and 0.1).

    With a retrieval coefficient of 0 the vocabulary logits are never built.
    """

    def objective(params: Any, batch: Batch, rngs: Mapping[str, Array], train: bool) -> tuple[Array, Any]:
        h = call(model, params, "encode", batch["inputs"], batch["mask"], train, rngs=_dropout(rngs, 0))
        loss, sums = task_loss(model, params, h, batch, rngs, train)
        loss = config.task_loss_coeff * loss
        if config.retrieval_loss_coeff:
            extra, more = retrieval_loss(model, params, h, batch, rngs, train, config.retrieval_percentage)
            loss, sums = loss + config.retrieval_loss_coeff * extra, {**sums, **more}
        examples = batch["weight"].sum()
        return loss, {**sums, "loss": (loss * examples, examples)}

    return objective


OBJECTIVES: dict[str, Callable[[MultiplexedTransformer, Any], Objective]] = {
    "retrieval": retrieval,
    "classification": classification,
}


def every_retrieval(model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch) -> dict[str, tuple[Array, Array]]:
    """Retrieval accuracy over every token of every instance, position 0 excepted (it is the same for all): `[N]` sums.

    Instances are read one after another, so that one plane of vocabulary logits exists at a time.
    """
    tokens = batch["inputs"]
    counted = batch["mask"] * batch["weight"][..., None].astype(batch["mask"].dtype)
    counted = counted.at[..., 0].set(0)

    def one(i: Array) -> tuple[Array, Array]:
        instance = jnp.full(h_BxLxD.shape[:2], i)
        logits = call(model, params, "retrieve", h_BxLxD, instance)
        return ((logits.argmax(-1) == tokens[:, i]) * counted[:, i]).sum(), counted[:, i].sum()

    return {"retrieval_accuracy": jax.lax.map(one, jnp.arange(tokens.shape[1]))}


def _dropout(rngs: Mapping[str, Array], use: int) -> dict[str, Array]:
    """A dropout stream for one of several calls to the network, each with masks of its own."""
    return {"dropout": jax.random.fold_in(rngs["dropout"], use)} if "dropout" in rngs else {}
