"""Schedules, and AdamW with decay and freeze masks."""

from __future__ import annotations

from typing import Any

import flax.traverse_util
import jax
import optax

from datamux_jax.errors import choose

SCHEDULES = ("constant", "linear", "cosine")


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
    return _by_path(params, lambda path: path[-1] != "bias" and not any("norm" in part for part in path))


def frozen(params: Any, learn_mux: bool) -> Any:
    """True at leaves that never change: the multiplexers' own vectors and matrices, unless they are learned."""
    return _by_path(params, lambda path: path[-1] == "instance_embedding" and not learn_mux)


def make(config: Any) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW; frozen leaves get no update and no moments.

    Works on parameter trees with and without logical-axis boxes.
    """
    opt = config.optimizer
    parts = [optax.clip_by_global_norm(opt.grad_clip)] if opt.grad_clip else []
    parts.append(optax.adamw(schedule(config), opt.b1, opt.b2, opt.eps, weight_decay=opt.weight_decay, mask=decayed))

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda f: "frozen" if f else "trained", frozen(params, config.mux.learned))

    return optax.partition({"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}, labels)


def _by_path(params: Any, rule: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: rule(path) for path in flat})
