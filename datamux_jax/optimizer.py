"""Schedules, and update rules with decay and freeze masks: AdamW, as optax has it or as the published code has it, and SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from datamux_jax.errors import choose

SCHEDULES = ("constant", "linear", "cosine")
UPDATE_RULES = ("adamw", "published", "sgd")


def schedule(config: Any) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0 over `warmup_steps`, then constant, linear or cosine decay to 0."""
    opt, steps = config.optimizer, config.steps
    name = choose(SCHEDULES, opt.schedule, "The schedule optimizer.schedule =")
    decay = max(steps - opt.warmup_steps, 1)
    body = {
        "constant": lambda: optax.constant_schedule(opt.learning_rate),
        "linear": lambda: optax.linear_schedule(opt.learning_rate, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(opt.learning_rate, decay),
    }[name]()
    if not opt.warmup_steps:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, opt.learning_rate, opt.warmup_steps), body], [opt.warmup_steps])


def decayed(params: Any) -> Any:
    """True at leaves that take weight decay: everything but biases and LayerNorm (BERT's convention)."""
    return _by_path(params, _decays)


def frozen(params: Any, learn_mux: bool) -> Any:
    """True at leaves that never change: the multiplexers' own vectors and matrices, unless they are learned; and a teacher."""
    return _by_path(params, lambda path: path[0] == "teacher" or (path[-1] == "instance_embedding" and not learn_mux))


def norm(gradients: Any, learn_mux: bool) -> jax.Array:
    """The global norm of what the optimizer uses: gradients of frozen leaves are left out, as clipping leaves them out."""
    return optax.tree.norm(
        jax.tree.map(lambda g, f: jnp.zeros((), g.dtype) if f else g, gradients, frozen(gradients, learn_mux))
    )


def make(config: Any) -> optax.GradientTransformation:
    """Global-norm clipping, then the update rule; frozen leaves get no update and no moments.

    Works on parameter trees with and without logical-axis boxes.
    """
    opt = config.optimizer
    parts = [optax.clip_by_global_norm(opt.grad_clip)] if opt.grad_clip else []
    rule = choose(UPDATE_RULES, opt.update_rule, "The update rule optimizer.update_rule =")
    if rule == "sgd":  # Decay is part of the gradient here, as in torch.
        parts += [optax.add_decayed_weights(opt.weight_decay, decayed)] if opt.weight_decay else []
        parts.append(optax.sgd(schedule(config), opt.momentum or None))
    elif rule == "adamw":
        parts.append(optax.adamw(schedule(config), opt.b1, opt.b2, opt.eps, weight_decay=opt.weight_decay, mask=decayed))
    else:
        parts.append(published_adamw(schedule(config), opt.b1, opt.b2, opt.eps, weight_decay=opt.weight_decay))

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda f: "frozen" if f else "trained", frozen(params, config.mux.learned))

    return optax.partition({"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}, labels)


def published_adamw(
    rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW as in Hugging Face Transformers 4.4, with which the published models were trained.

    With uncorrected moments `m` and `v` at update `t` (from 1):

        p <- p - rate * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)
        p <- p - rate * weight_decay * p                     (not for biases and LayerNorm)

    So `eps` stands beside the uncorrected moment, which makes the first updates smaller than AdamW's wherever gradients are tiny, and
    decay acts on what the first line leaves.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any) -> tuple[Any, optax.ScaleByAdamState]:
        step_rate, count = rate(state.count), state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        size = step_rate * jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def change(path: Any, m: Any, v: Any, p: Any) -> Any:
            moved = -size * m / (jnp.sqrt(v) + eps)
            return moved - step_rate * weight_decay * (p + moved) if _decays([key.key for key in path]) else moved

        return jax.tree_util.tree_map_with_path(change, mu, nu, params), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _decays(path: Sequence[str]) -> bool:
    return not path[-1].endswith("bias") and not any("norm" in part for part in path)


def _by_path(params: Any, rule: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: rule(path) for path in flat})
