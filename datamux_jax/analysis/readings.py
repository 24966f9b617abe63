"""What a network says about every instance, and the state that it says it from, whatever the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from datamux_jax import losses
from datamux_jax.layers import Array
from datamux_jax.model import MultiplexedTransformer, Network, call
from datamux_jax.runs import Run


class Reading(NamedTuple):
    """Readings of a batch, at `P` positions of an instance: one of a sequence, every token's elsewhere.

    Attributes:
      mixed: states of the mixed rows that are unmixed, `[B, P, D]`; of a sequence, their mean over all real positions.
      states: demultiplexed states, `[B, N, P, D]`.
      weight: 1 where something is predicted, `[B, N, P]`.
      guess: what is predicted: class, tag, token, replaced (1) or not (0), or a number; `[B, N, P]`.
      truth: what should be, likewise.
      mark: what pictures are coloured by, likewise: the truth, or the token.
    """

    mixed: Array
    states: Array
    weight: Array
    guess: Array
    truth: Array
    mark: Array


def sequence_reading(model: MultiplexedTransformer, params: Any, batch: Any, h_BxLxD: Array) -> Reading:
    states = call(model, params, "features", h_BxLxD, batch["mask"])
    logits = call(model, params, "classify", h_BxLxD, batch["mask"])
    guess = logits[..., 0] if batch["label"].dtype == jnp.float32 else logits.argmax(-1)
    real = model.fed_mask(batch["mask"]).max(1)[..., None].astype(h_BxLxD.dtype)
    mixed = (h_BxLxD * real).sum(1) / jnp.maximum(real.sum(1), 1)
    weight = jnp.ones((*guess.shape, 1))
    label = batch["label"][..., None]
    return Reading(mixed[:, None], states[:, :, None], weight, guess[..., None], label, label)


def image_reading(model: Network, params: Any, batch: Any, h_BxD: Array) -> Reading:
    states = call(model, params, "features", h_BxD, batch["mask"])
    guess = call(model, params, "classify", h_BxD, batch["mask"]).argmax(-1)
    label = batch["label"][..., None]
    return Reading(h_BxD[:, None], states[:, :, None], jnp.ones(label.shape), guess[..., None], label, label)


def tag_reading(model: MultiplexedTransformer, params: Any, batch: Any, h_BxLxD: Array) -> Reading:
    states = call(model, params, "token_states", h_BxLxD)
    guess = call(model, params, "tag", h_BxLxD).argmax(-1)
    label = batch["label"][..., : guess.shape[2]]
    return Reading(h_BxLxD[:, model.offset :], states, label != losses.NO_LABEL, guess, label, label)


def replaced_reading(model: MultiplexedTransformer, params: Any, batch: Any, h_BxLxD: Array) -> Reading:
    states = call(model, params, "token_states", h_BxLxD)
    guess = call(model, params, "replaced", h_BxLxD) > 0
    tokens, weight = (batch[name][..., : guess.shape[2]] for name in ("inputs", "mask"))
    return Reading(h_BxLxD[:, model.offset :], states, weight, guess, jnp.zeros_like(guess), tokens)


def token_reading(model: MultiplexedTransformer, params: Any, batch: Any, h_BxLxD: Array) -> Reading:
    states = call(model, params, "token_states", h_BxLxD, False, "retrieval")
    guess, _, weight = losses.read_back(model, params, h_BxLxD, batch)
    tokens = batch["inputs"][..., : guess.shape[2]]
    return Reading(h_BxLxD[:, model.offset :], states, weight, guess, tokens, tokens)


# Objective -> what is read, and what a right prediction is called.
READINGS: dict[str, tuple[Callable[..., Reading], str]] = {
    "classification": (sequence_reading, "class"),
    "regression": (sequence_reading, "number"),
    "tagging": (tag_reading, "tag of a word"),
    "retrieval": (token_reading, "token read back"),
    "states": (token_reading, "token read back"),
    "mlm": (token_reading, "token read back, nothing being masked"),
    "electra": (replaced_reading, "token said to be original, as all of them are here"),
}


def reader(run: Run) -> Callable[[Any, Any], Reading]:
    """The jitted function `(params, batch) -> Reading` of a run; states are float32."""
    read = READINGS[run.config.objective][0] if isinstance(run.model, MultiplexedTransformer) else image_reading

    def reading(params: Any, batch: Any) -> Reading:
        found = read(run.model, params, batch, call(run.model, params, "encode", batch["inputs"], batch["mask"]))
        weight = found.weight * batch["weight"][..., None]
        return found._replace(
            mixed=found.mixed.astype(jnp.float32), states=found.states.astype(jnp.float32), weight=weight.astype(jnp.float32)
        )

    return jax.jit(reading)
