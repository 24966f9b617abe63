"""Checks of a complete config, before any work. The keys themselves stand, commented, in `configs/common.py`."""

from __future__ import annotations

import math
from typing import Any

from datamux_jax import classifier, packaged
from datamux_jax.backbones import BACKBONES
from datamux_jax.backbones.encoder import REMAT
from datamux_jax.backbones.vision import VISION
from datamux_jax.demux import DEMUX, RSA_FORMS
from datamux_jax.errors import InputError, choose
from datamux_jax.families import FAMILIES
from datamux_jax.layers import ATTENTION
from datamux_jax.losses import CLASSIFICATION_LOSSES, TASK_LOSSES
from datamux_jax.model import POOLS
from datamux_jax.mux import MUX
from datamux_jax.objectives import OBJECTIVES
from datamux_jax.optimizer import SCHEDULES, UPDATE_RULES
from datamux_jax.unmixing import UNMIXING

DTYPES = ("float32", "bfloat16")
GENERATORS = ("uniform", "plain", "muxed")
PREFIXES = ("extend", "cut")


def validate(config: Any) -> None:
    """Checks values and their combinations.

    Raises:
      InputError: names the key, its value, the rule and the way out.
    """
    _numbers(config)
    images = choose({**BACKBONES, **VISION}, config.model.backbone, "The backbone model.backbone =") in VISION
    mixers = {"none", *(classifier.MIXERS if images else MUX)}
    unmixers = {"none", *(UNMIXING if images else DEMUX)}
    if images:
        classifier.check(config)
    for table, key in (
        (mixers, "mux.name"),
        (unmixers, "demux.name"),
        (CLASSIFICATION_LOSSES, "task_loss"),
        (RSA_FORMS, "demux.form"),
        (PREFIXES, "demux.prefix"),
        (FAMILIES, "model.family"),
        (GENERATORS, "generator.kind"),
        (OBJECTIVES, "objective"),
        (SCHEDULES, "optimizer.schedule"),
        (UPDATE_RULES, "optimizer.update_rule"),
        (REMAT, "remat"),
        (POOLS, "model.pool"),
        (DTYPES, "dtype"),
        (ATTENTION, "attention"),
    ):
        choose(table, _get(config, key), f"The config value {key} =")
    plain = [key for key in ("mux", "demux") if config[key].name == "none"]
    if len(plain) == 1:
        other = "demux" if plain == ["mux"] else "mux"
        raise InputError(
            f"{plain[0]}.name = 'none' goes with {other}.name = 'none': the plain network neither mixes nor unmixes. "
            f"Set both, or choose a {plain[0]}."
        )
    if plain and config.num_instances != 1:
        raise InputError(
            f"mux.name = 'none' is the plain network for one instance, but num_instances = {config.num_instances}. Choose a "
            f"multiplexer ({', '.join(sorted(set(mixers) - {'none'}))}), or set num_instances = 1."
        )
    if config.task_loss != "cross_entropy" and config.objective != "classification":
        raise InputError(
            f"task_loss = {config.task_loss!r} is a loss of classification, but objective = {config.objective!r}. Leave it "
            "'cross_entropy'."
        )
    if not images and config.model.hidden_size % config.model.num_heads:
        raise InputError(
            f"model.hidden_size = {config.model.hidden_size} is not divisible by model.num_heads = {config.model.num_heads}. "
            "Every head takes an equal share of the width."
        )
    if config.demux.name == "rsa" and config.demux.form == "bert" and config.demux.num_layers < 2:
        raise InputError(
            f"demux.form = 'bert' uses two layers for retrieval, but demux.num_layers = {config.demux.num_layers}. Set 2 or more, "
            "or use the form 'paper'."
        )
    if (
        not images
        and config.mux.name in ("binary_hadamard", "random_ortho_low_rank")
        and config.num_instances > (config.model.embedding_size or config.model.hidden_size)
    ):
        raise InputError(
            f"mux.name = {config.mux.name!r} gives each of num_instances = {config.num_instances} a chunk of the embedding, which is "
            f"{config.model.embedding_size or config.model.hidden_size} wide. Use fewer instances, or another multiplexer."
        )
    if config.objective == "electra" and config.generator.kind == "muxed" and plain:
        raise InputError("generator.kind = 'muxed' needs a multiplexer. Use 'plain' for the plain network, or choose mux.name.")
    if config.generator.hidden_size % config.generator.num_heads:
        raise InputError(
            f"generator.hidden_size = {config.generator.hidden_size} is not divisible by generator.num_heads = "
            f"{config.generator.num_heads}. Every head takes an equal share of the width."
        )
    if config.optimizer.warmup_steps > config.steps:
        raise InputError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than steps = {config.steps}. Shorten the warm-up."
        )
    if config.objective in ("classification", "regression", "tagging") and not config.task_loss_coeff:
        raise InputError("task_loss_coeff = 0 leaves no task to learn. Use objective = 'retrieval' for the warm-up.")
    if config.attention == "cudnn":
        _cudnn(config)
    if config.objective == "states":
        _states(config)
    elif config.distill.teacher:
        _teaching(config)


def with_instances(config: Any, count: int) -> Any:
    """A copy of a config with another N, to compare with.

    N = 1 is the plain network, which has the task loss alone; a plain one becomes the default multiplexed one.

    Raises:
      InputError: `count` is no number of instances.
    """
    if count < 1:
        raise InputError(f"{count} is no number of instances. Give numbers above 0, such as 1,2,5,10.")
    config = config.copy_and_resolve_references()
    config.num_instances = count
    if count == 1:
        config.mux.name = config.demux.name = "none"
        config.task_loss_coeff, config.retrieval_loss_coeff = 1.0, 0.0
    elif config.mux.name == "none":
        config.mux.name, config.demux.name = "gaussian_hadamard", "rsa"
    return config


def _teaching(config: Any) -> None:
    """Checks the section `distill` of a config that names a teacher."""
    if not 0 < config.distill.weight <= 1:
        raise InputError(
            f"distill.weight = {config.distill.weight} is the teacher's share of the task loss. Set it above 0, and to 1 at most; "
            "distill.teacher = '' trains without one."
        )
    if config.objective not in TASK_LOSSES:
        raise InputError(
            f"distill.teacher = {config.distill.teacher!r} teaches a task, but objective = {config.objective!r} is none. Set it for "
            f"runs of {', '.join(TASK_LOSSES)} alone, or learn the teacher's hidden states: objective = 'states'."
        )


def _states(config: Any) -> None:
    """Checks a config of state distillation."""
    if not config.distill.teacher:
        raise InputError(
            "objective = 'states' learns the hidden states of a plain network, but distill.teacher = '' names none. Name the folder of "
            f"a plain run or of a published encoder, or {', '.join(packaged.PACKAGES)}; objective = 'retrieval' needs none."
        )
    if config.demux.name == "index" and config.demux.prefix == "cut":
        raise InputError(
            "demux.prefix = 'cut' pushes the last tokens out of the rows, so objective = 'states' has no states of them to learn. Use "
            "demux.prefix = 'extend'."
        )
    if not config.task_loss_coeff:
        raise InputError(
            "task_loss_coeff = 0 leaves objective = 'states' no states to learn. Use objective = 'retrieval', or set it above 0."
        )


def _cudnn(config: Any) -> None:
    """Checks a config with cuDNN's attention."""
    if config.dtype != "bfloat16":
        raise InputError(
            f"attention = 'cudnn' computes in bfloat16, but dtype = {config.dtype!r}. Set dtype = 'bfloat16', or attention = 'xla'."
        )
    if config.model.attention_dropout_rate:
        raise InputError(
            "attention = 'cudnn' drops no attention weights, but model.attention_dropout_rate = "
            f"{config.model.attention_dropout_rate}. Set it to 0, or attention = 'xla'."
        )
    size = config.model.hidden_size // config.model.num_heads
    if size % 8 or size > 128:
        raise InputError(
            "attention = 'cudnn' takes heads of a multiple of 8 dimensions, 128 at most, but model.hidden_size = "
            f"{config.model.hidden_size} and model.num_heads = {config.model.num_heads} make them {size}. Change the number of heads, "
            "or use attention = 'xla'."
        )


POSITIVE = (
    *("num_instances", "batch_groups", "accumulation", "steps", "log_every", "retrieval_percentage", "logits_mib"),
    *("checkpoint.every", "checkpoint.keep", "eval.groupings", "eval.batch_groups", "benchmark.windows", "benchmark.seconds"),
    *("model.hidden_size", "model.num_layers", "model.num_heads", "model.mlp_dim", "model.layer_norm_eps", "demux.num_layers"),
    *("optimizer.learning_rate", "optimizer.eps", "distill.temperature"),
    *("generator.hidden_size", "generator.num_layers", "generator.num_heads", "generator.mlp_dim", "mask_rate"),
)
NOT_NEGATIVE = (
    *("seed", "data.length", "mux.norm", "retrieval_loss_coeff", "task_loss_coeff", "distill.layers"),
    *("model.embedding_size", "model.init_stddev", "model.type_vocab_size", "model.max_positions"),
    *("mux.epsilon", "generator.embedding_size", "generator_loss_coeff", "discriminator_loss_coeff"),
    *("checkpoint.keep_best", "eval.every", "eval.examples", "data.validation_share", "data.validation_examples"),
    "data.image_size",
    *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.grad_clip"),
)
BELOW_ONE = (
    "model.dropout_rate",
    "model.attention_dropout_rate",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.momentum",
    "mask_rate",
)


def _numbers(config: Any) -> None:
    for key in POSITIVE:
        if not 0 < _get(config, key) < math.inf:
            raise InputError(f"{key} = {_get(config, key)} is not positive and finite. Set it to a number above 0.")
    for key in NOT_NEGATIVE:
        if not 0 <= _get(config, key) < math.inf:
            raise InputError(f"{key} = {_get(config, key)} is negative or not finite. Set it to 0 or more.")
    for key in BELOW_ONE:
        if not 0 <= _get(config, key) < 1:
            raise InputError(f"{key} = {_get(config, key)} is not between 0 and 1. Set it to 0 or more, and below 1.")
    if config.seed >= 2**32:
        raise InputError(f"seed = {config.seed} does not fit into 32 bits. Choose one below {2**32}.")
    if config.retrieval_percentage > 1:
        raise InputError(f"retrieval_percentage = {config.retrieval_percentage} is a share. Set it above 0, and to 1 at most.")


def _get(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config
