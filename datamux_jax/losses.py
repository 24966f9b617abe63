"""Terms of the objectives, on hidden states that exist already: the sums of each.

A batch is a dict of arrays: `inputs` `[B, N, L]` or `[B, N, L, F]`, `mask` `[B, N, L]`, `label` `[B, N]` (tagging: `[B, N, L]`, -100
where there is none) and `weight` `[B, N]`, which is 0 for rows that only fill up a group; and, where another network
teaches, its outputs as `teacher`. Sums are described in `metrics.py`; accuracies have one entry an instance slot. A term's loss is the
mean of its sums, `mean(sums, name)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from datamux_jax import corruption, vocabulary
from datamux_jax.layers import Array
from datamux_jax.model import MultiplexedTransformer, Network, call

Batch = Mapping[str, Array]
Sums = dict[str, tuple[Array, Array]]
NO_LABEL = -100


Totals = Mapping[str, Array]


def mean(sums: Sums, name: str, totals: Totals | None = None) -> Array:
    """The mean that the sums of a term stand for; 0 if nothing has weight, so that an empty batch has no gradient.

    Args:
      sums: of a batch.
      name: of the term.
      totals: weight of every term in the whole batch of which this is one micro-batch. The means of all micro-batches then add up
        to that of the whole batch.
    """
    total, weight = sums[name]
    return total / jnp.maximum(weight if totals is None else totals[name], 1.0)


Drawn = tuple[Array, Array, Array, Array]


def draw_retrieval(
    model: MultiplexedTransformer, keys_B: Array, fed_BxNxL: Array, percentage: float, *, pads_count: bool = False
) -> Drawn:
    """Draws what token retrieval asks for, see `asked`.

    Args:
      model: the network.
      keys_B: random keys of the groups.
      fed_BxNxL: the tokens that it was fed (`MultiplexedTransformer.feed`).
      percentage: share of the positions that carry a loss, each kept independently.
      pads_count: padding is asked for too, as published pre-training does.
    """
    instance_keys, keep_keys = corruption.split(keys_B, 2)
    _, instances, length = fed_BxNxL.shape
    instance = corruption.draw_instances(instance_keys, length, instances)
    drawn = asked(model, fed_BxNxL, instance, pads_count=pads_count)
    if percentage == 1.0:
        return drawn
    weight = drawn[2] * corruption.flips(keep_keys, percentage, drawn[2].shape[1:])
    kept, index = jax.lax.top_k(weight, corruption.capacity(weight.shape[1], percentage))
    instance, target, _, position = (jnp.take_along_axis(x, index, axis=1) for x in drawn)
    return instance, target, kept, position


def asked(model: MultiplexedTransformer, fed_BxNxL: Array, instance_BxL: Array, *, pads_count: bool = False) -> Drawn:
    """What retrieval asks for, given the instance drawn at every position of the fed rows.

    Returns:
      `(instance, target, weight, position)`, all `[B, P]`: only positions that can carry a loss are listed.
    """
    start, length = model.retrieval_start, instance_BxL.shape[1]
    pad = None if pads_count or model.tokens is None else model.tokens.pad
    target, weight = corruption.retrieval_targets(fed_BxNxL, instance_BxL, pad=pad)
    position = jnp.broadcast_to(jnp.arange(start, length), (len(target), length - start))
    return instance_BxL[:, start:], target[:, start:], weight[:, start:], position


def retrieval_loss(
    model: MultiplexedTransformer,
    params: Any,
    h_BxLxD: Array,
    drawn: Drawn,
    rngs: Mapping[str, Array],
    train: bool,
) -> Sums:
    """Token retrieval on hidden states that exist already: cross-entropy over the vocabulary (DataMUX, section 3.3).

    Logits exist at the drawn positions only. Rows that only fill up a group count too, as published.
    """
    instance, target, weight, position = drawn
    states = call(model, params, "read", h_BxLxD, instance, position, train, rngs=dropout_stream(rngs, 1))
    loss, right, _ = vocabulary.cross_entropy(model, params, states, target)
    return _token_sums("retrieval", model.num_instances, loss, right, instance, weight)


def classification_loss(
    model: Network, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> tuple[Sums, Array]:
    """Cross-entropy of sequence classification, mean over all instances of all groups; and the logits `[B, N, C]`."""
    logits = call(model, params, "classify", h_BxLxD, batch["mask"], train, rngs=dropout_stream(rngs, 2))
    return _cross_entropy(logits, batch["label"], batch["weight"]), logits


def squared_loss(
    model: Network, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> tuple[Sums, Array]:
    """DataMUX's loss for images: the mean of `0.5 * (y - t)^2` over groups and classes, summed over instances; and logits `[B, N, C]`.

    Targets `t` are 1 for the class and -1 for the others. Outputs `y` are tanh of the logits; it lies here, and not in the network, so
    that softmax of what the network gives is a probability: of numbers between -1 and 1 it could never be near 0 or 1. In the sums
    stands the mean over all instances times `N`, which is the same where every slot has as many examples, as in training.
    """
    logits = call(model, params, "classify", h_BxLxD, batch["mask"], train, rngs=dropout_stream(rngs, 2))
    label, weight = batch["label"], batch["weight"]
    target = 2 * jax.nn.one_hot(label, logits.shape[-1]) - 1
    loss = 0.5 * jnp.square(jnp.tanh(logits) - target).mean(-1) * label.shape[1]
    sums = _cross_entropy(logits, label, weight)  # Accuracy is read in the same way.
    return {**sums, "task_loss": ((loss * weight).sum(), weight.sum())}, logits


def regression_loss(
    model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> tuple[Sums, Array]:
    """Squared error of one number a sequence, mean over all instances of all groups; and the numbers `[B, N]`."""
    outputs = call(model, params, "classify", h_BxLxD, batch["mask"], train, rngs=dropout_stream(rngs, 2))[..., 0]
    error = jnp.square(outputs - batch["label"].astype(outputs.dtype))
    weight = batch["weight"]
    return {
        "task_loss": ((error * weight).sum(), weight.sum()),
        "squared_error": ((error * weight).sum(0), weight.sum(0)),
    }, outputs


def tagging_loss(
    model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> tuple[Sums, Array]:
    """Cross-entropy of token classification, mean over all labelled tokens of all instances; and the logits `[B, N, L, C]`."""
    logits = call(model, params, "tag", h_BxLxD, train, rngs=dropout_stream(rngs, 2))
    label = batch["label"][..., : logits.shape[2]]
    weight = (label != NO_LABEL) * batch["weight"][..., None]
    return _cross_entropy(logits, jnp.maximum(label, 0), weight), logits


def distillation_loss(outputs: Array, batch: Batch, temperature: float) -> Sums:
    """How far a task's outputs are from those of a teacher, mean over what the task's loss is a mean of.

    Classes and tags: `T^2 * KL(softmax(teacher / T) || softmax(outputs / T))`, whose gradients keep their size whatever `T` is (Hinton
    et al. 2015, section 2). Numbers: squared error.

    Args:
      outputs: logits `[B, N, C]` or `[B, N, L, C]`, or numbers `[B, N]`.
      batch: with `teacher`, shaped likewise; `L` may be more there, see `tagging_loss`.
      temperature: `T`.
    """
    weight, teacher = batch["weight"], batch["teacher"].astype(jnp.float32)
    if outputs.ndim == 2:
        loss = jnp.square(outputs - teacher)
    else:
        if outputs.ndim == 4:
            length = outputs.shape[2]
            teacher = teacher[:, :, :length]
            weight = (batch["label"][..., :length] != NO_LABEL) * weight[..., None]
        wanted = jax.nn.log_softmax(teacher / temperature)
        found = jax.nn.log_softmax(outputs.astype(jnp.float32) / temperature)
        loss = temperature**2 * (jnp.exp(wanted) * (wanted - found)).sum(-1)
    return {"distill_loss": ((loss * weight).sum(), weight.sum())}


def replaced_loss(
    model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch, rngs: Mapping[str, Array], train: bool
) -> Sums:
    """ELECTRA's discriminator: binary cross-entropy of "replaced" (`label`, `[B, N, L]`), mean over tokens that are no padding."""
    logits = call(model, params, "replaced", h_BxLxD, train, rngs=dropout_stream(rngs, 2))
    length = logits.shape[2]
    label = batch["label"][..., :length].astype(jnp.float32)
    weight = batch["mask"][..., :length] * batch["weight"][..., None]
    loss = optax.sigmoid_binary_cross_entropy(logits, label)
    right = ((logits > 0) == (label > 0)) * weight
    return {
        "task_loss": ((loss * weight).sum(), weight.sum()),
        "replaced_accuracy": (right.sum((0, 2)), weight.sum((0, 2))),
    }


def chosen_tokens_loss(
    model: MultiplexedTransformer,
    params: Any,
    h_BxLxD: Array,
    tokens_BxNxL: Array,
    chosen_BxNxL: Array,
    room: int,
    rngs: Mapping[str, Array],
    train: bool,
    sample_keys_B: Array | None = None,
) -> tuple[Sums, tuple[Array, Array, Array, Array]]:
    """MLM: cross-entropy over the vocabulary at the chosen tokens of all instances; logits exist only there.

    Args:
      model: the network.
      params: its parameters.
      h_BxLxD: hidden states of the rows.
      tokens_BxNxL: the original tokens.
      chosen_BxNxL: which of them are asked for.
      room: how many a group at most.
      rngs: random keys.
      train: draw dropout.
      sample_keys_B: to draw tokens from what is predicted; None: the likeliest.

    Returns:
      Sums, and `(token, instance, position, weight)`, all `[B, P]`: the drawn tokens, where they stand (positions counted without
      prefix), and 0 where nothing is asked for.
    """
    body = h_BxLxD.shape[1] - model.offset  # A cut prefix pushes the last tokens out.
    instance, position, weight = corruption.gather_chosen(chosen_BxNxL[..., :body], min(room, model.num_instances * body))
    states = call(model, params, "read", h_BxLxD, instance, position + model.offset, train, rngs=dropout_stream(rngs, 2))
    target = tokens_BxNxL[jnp.arange(len(instance))[:, None], instance, position]
    keys = None if sample_keys_B is None else jnp.swapaxes(corruption.split(sample_keys_B, instance.shape[1]), 0, 1)
    loss, right, token = vocabulary.cross_entropy(model, params, states, target, keys)
    return _token_sums("mlm", model.num_instances, loss, right, instance, weight), (token, instance, position, weight)


def states_loss(
    model: MultiplexedTransformer,
    params: Any,
    h_KxBxLxD: Array,
    teacher_KxBxNxLxD: Array,
    batch: Batch,
    keys_B: Array,
    rngs: Mapping[str, Array],
    train: bool,
) -> Sums:
    """Squared error of guesses of a teacher's hidden states: of the last layer, and of those below it.

    Targets are the teacher's states, each normalised to mean 0 and variance 1 over its numbers (as data2vec does, Baevski et al. 2022),
    so that 1 is the error of guessing zeros. On the last layer the demultiplexed state of every token guesses; below it, linear
    readouts of all instances at `L / N` positions a row, drawn anew for every row, which costs the same whatever `N` is.

    Args:
      model: the network.
      params: its parameters.
      h_KxBxLxD: hidden states of the mixed rows after each of the `K` layers.
      teacher_KxBxNxLxD: the teacher's, of every instance by itself.
      batch: with `mask` and `weight`.
      keys_B: random keys of the groups.
      rngs: random keys.
      train: draw dropout.

    Returns:
      `state_loss` of the last layer, `layer_loss` of all others (absent if there are none).
    """
    length = batch["mask"].shape[2]
    weight_BxNxL = (batch["mask"] * batch["weight"][..., None]).astype(jnp.float32)
    target_KxBxNxLxD = jax.lax.stop_gradient(_normalised(teacher_KxBxNxLxD))
    guess = call(model, params, "states", h_KxBxLxD[-1], train, rngs=dropout_stream(rngs, 2))
    error_BxNxL = jnp.square(guess - target_KxBxNxLxD[-1]).mean(-1)
    sums: Sums = {"state_loss": ((error_BxNxL * weight_BxNxL).sum(), weight_BxNxL.sum())}
    if len(h_KxBxLxD) > 1:
        position_BxP = corruption.draw_positions(keys_B, length, -(-length // model.num_instances))
        h_KxBxPxD = jnp.take_along_axis(h_KxBxLxD[:-1], position_BxP[None, ..., None] + model.offset, axis=2)
        target = jnp.take_along_axis(target_KxBxNxLxD[:-1], position_BxP[None, :, None, :, None], axis=3)
        weight_BxNxP = jnp.take_along_axis(weight_BxNxL, position_BxP[:, None], axis=2)
        error_BxNxP = jnp.square(call(model, params, "layer_states", h_KxBxPxD) - target).mean((0, -1))
        sums["layer_loss"] = ((error_BxNxP * weight_BxNxP).sum(), weight_BxNxP.sum())
    return sums


def _normalised(x: Array) -> Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def every_retrieval(model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch) -> Sums:
    """Retrieval over every token of every instance, position 0 excepted (it is the same for all): loss, and accuracy by instance."""
    read, loss, counted = read_back(model, params, h_BxLxD, batch)
    right = (read == batch["inputs"][..., : read.shape[2]]) * counted
    return {
        "retrieval_loss": ((loss * counted).sum(), counted.sum()),
        "retrieval_accuracy": (right.sum((0, 2)), counted.sum((0, 2))),
    }


def read_back(model: MultiplexedTransformer, params: Any, h_BxLxD: Array, batch: Batch) -> tuple[Array, Array, Array]:
    """What retrieval reads at every token of every instance.

    Instances are read one after another, so that one plane of vocabulary logits exists at a time.

    Returns:
      Token ids, their cross-entropy, and 1 where a token counts (not at position 0, which is the same for all), all `[B, N, L]`; with a
      cut index prefix, of the tokens that are left.
    """
    body = h_BxLxD.shape[1] - model.offset
    tokens = batch["inputs"][..., :body]
    counted = batch["mask"][..., :body] * batch["weight"][..., None].astype(batch["mask"].dtype)
    counted = counted.at[..., 0].set(0)
    position = jnp.broadcast_to(jnp.arange(body) + model.offset, (len(tokens), body))

    def one(i: Array) -> tuple[Array, Array]:
        states = call(model, params, "read", h_BxLxD, jnp.full_like(position, i), position)
        loss, _, likeliest = vocabulary.cross_entropy(model, params, states, tokens[:, i])
        return likeliest, loss

    read, loss = (jnp.swapaxes(x, 0, 1) for x in jax.lax.map(one, jnp.arange(tokens.shape[1])))
    return read, loss, counted


# What fine-tuning and evaluation score: functions that return sums and outputs.
TASK_LOSSES = {"classification": classification_loss, "regression": regression_loss, "tagging": tagging_loss}
# Of classification: what `task_loss` names.
CLASSIFICATION_LOSSES = {"cross_entropy": classification_loss, "squared": squared_loss}


def has_teacher(config: Any) -> bool:
    """Whether batches hold what a teacher says of the examples, beside the labels of a task."""
    return bool(config.distill.teacher) and config.objective in TASK_LOSSES


def task_loss(config: Any) -> Callable[..., tuple[Sums, Array]]:
    """The function that fine-tuning and evaluation of `config` score with."""
    return CLASSIFICATION_LOSSES[config.task_loss] if config.objective == "classification" else TASK_LOSSES[config.objective]


def _token_sums(name: str, instances: int, loss: Array, right: Array, instance: Array, weight: Array) -> Sums:
    """The sums `NAME_loss` and `NAME_accuracy`, the latter by instance, of `[B, P]` predicted tokens."""
    slot = jax.nn.one_hot(instance, instances)
    return {
        f"{name}_loss": ((loss * weight).sum(), weight.sum()),
        f"{name}_accuracy": (jnp.einsum("bp,bpn->n", right * weight, slot), jnp.einsum("bp,bpn->n", weight, slot)),
    }


def _cross_entropy(logits: Array, label: Array, weight: Array) -> Sums:
    """Cross-entropy: sums with one accuracy an instance, for `[B, N, ..., C]` logits."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    right = (logits.argmax(-1) == label) * weight
    others = tuple(axis for axis in range(weight.ndim) if axis != 1)
    return {"task_loss": ((loss * weight).sum(), weight.sum()), "accuracy": (right.sum(others), weight.sum(others))}


def dropout_stream(rngs: Mapping[str, Array], use: int) -> dict[str, Array]:
    """A dropout stream for one of several calls to the network, each with masks of its own."""
    return {"dropout": jax.random.fold_in(rngs["dropout"], use)} if "dropout" in rngs else {}
