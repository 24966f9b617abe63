"""One table of names, ours against those of published checkpoints. `hf.py` reads it in both directions.

An entry says which tensors of a published state dict make which parameters. Every conversion only transposes, reshapes, splits or
stacks, so both directions are exact, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from datamux_jax.build import SEQUENCE_OBJECTIVES, has_vocabulary_head
from datamux_jax.families import FAMILIES

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Some of our parameters, and the published tensors that hold the same numbers.

    Attributes:
      ours: parameter paths.
      theirs: keys of the state dict.
      to_ours: published arrays to parameters.
      to_theirs: the inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def copy(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,), list, list)


def turned(ours: str, theirs: str) -> Entry:
    """A matrix that is `[out, in]` there and `[in, out]` here."""
    return Entry((ours,), (theirs,), lambda a: [a[0].T], lambda a: [a[0].T])


def dense(ours: str, theirs: str) -> list[Entry]:
    return [turned(f"{ours}/kernel", f"{theirs}.weight"), copy(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Entry]:
    return [copy(f"{ours}/scale", f"{theirs}.weight"), copy(f"{ours}/bias", f"{theirs}.bias")]


def halves(ours: str, theirs: str) -> list[Entry]:
    """A dense layer over `[key ; state]`: one matrix there, one for each half here."""
    weight = Entry(
        (f"{ours}key_in/kernel", f"{ours}state_in/kernel"),
        (f"{theirs}.weight",),
        lambda a: [half.T for half in np.split(a[0], 2, axis=1)],
        lambda a: [np.concatenate([half.T for half in a], axis=1)],
    )
    return [weight, copy(f"{ours}state_in/bias", f"{theirs}.bias")]


def stacked(ours: str, theirs: Sequence[str], *, turn: bool = False) -> Entry:
    """Tensors of single instances there, one array with a leading instance axis here."""

    def side(array: np.ndarray) -> np.ndarray:
        return array.T if turn else array

    return Entry((ours,), tuple(theirs), lambda a: [np.stack([side(one) for one in a])], lambda a: [side(one) for one in a[0]])


def block(ours: str, theirs: str, heads: int) -> Iterator[Entry]:
    """A Transformer layer."""

    def split_kernel(a: Arrays) -> Arrays:
        return [a[0].T.reshape(a[0].shape[1], heads, -1)]

    def join_kernel(a: Arrays) -> Arrays:
        return [a[0].reshape(a[0].shape[0], -1).T]

    for part in ("query", "key", "value"):
        there = f"{theirs}.attention.self.{part}"
        yield Entry((f"{ours}/attention/{part}/kernel",), (f"{there}.weight",), split_kernel, join_kernel)
        yield Entry(
            (f"{ours}/attention/{part}/bias",),
            (f"{there}.bias",),
            lambda a: [a[0].reshape(heads, -1)],
            lambda a: [a[0].reshape(-1)],
        )
    yield Entry(
        (f"{ours}/attention/out/kernel",),
        (f"{theirs}.attention.output.dense.weight",),
        lambda a: [a[0].T.reshape(heads, -1, a[0].shape[0])],
        lambda a: [a[0].reshape(-1, a[0].shape[-1]).T],
    )
    yield copy(f"{ours}/attention/out/bias", f"{theirs}.attention.output.dense.bias")
    yield from norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
    yield from dense(f"{ours}/mlp_in", f"{theirs}.intermediate.dense")
    yield from dense(f"{ours}/mlp_out", f"{theirs}.output.dense")
    yield from norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")


def encoder(config: Any) -> Iterator[Entry]:
    """Embeddings and layers: what a plain encoder has."""
    m, prefix = config.model, FAMILIES[config.model.family].prefix
    yield copy("embeddings/word/embedding", f"{prefix}.embeddings.word_embeddings.weight")
    yield copy("embeddings/position", f"{prefix}.embeddings.position_embeddings.weight")
    if m.type_vocab_size:
        yield copy("embeddings/type", f"{prefix}.embeddings.token_type_embeddings.weight")
    yield from norm("embeddings/norm", f"{prefix}.embeddings.LayerNorm")
    if m.embedding_size not in (0, m.hidden_size):
        yield from dense("backbone/project", f"{prefix}.embeddings_project")
    for layer in range(m.num_layers):
        yield from block(f"backbone/layers_{layer}", f"{prefix}.encoder.layer.{layer}", m.num_heads)


def multiplexer(config: Any) -> Iterator[Entry]:
    heads = config.model.num_heads
    yield copy("mux/instance_embedding", "instance_embedding")
    if config.mux.name in ("contextual", "gaussian_attention"):
        yield from block("mux/over_positions", "muxing_attention", heads)
    if config.mux.name == "contextual":
        yield from block("mux/over_instances", "muxing_attention_2", heads)
    if config.mux.name == "gaussian_attention":
        yield from dense("mux/cross", "cross_instances_linear")
        yield from norm("mux/cross_norm", "cross_instances_layernorm")


def demultiplexer(config: Any) -> Iterator[Entry]:
    if config.demux.name == "rsa":
        yield copy("demux/keys", "demux_module.demux_instance_embedding")
        yield from halves("demux/", "demux_module.dense_1")
        for k in range(2, config.demux.num_layers + 1):
            yield from dense(f"demux/hidden_{k - 2}", f"demux_module.dense_{k}")
        for k in range(1, config.demux.num_layers + 1):
            yield from norm(f"demux/norms_{k - 1}", f"demux_module.layer_norm_{k}")
        for stack, theirs in (("task", "demultiplexer"), ("retrieval", "retrieval_head")):
            yield from dense(f"demux/{stack}_out", f"{theirs}.pre_decoder")
            yield from norm(f"demux/{stack}_norm", f"{theirs}.pre_decoder_layer_norm")
        return
    for stack, theirs in (("task", "demultiplexer"), ("retrieval", "retrieval_head")):
        if config.demux.name == "index":
            yield from halves(f"demux/{stack}/", f"{theirs}.dense")
            yield from norm(f"demux/{stack}/norm", f"{theirs}.layer_norm")
        else:
            of = range(config.num_instances)
            for kind, part in (("weight", "kernel"), ("bias", "bias")):
                keys = [f"{theirs}.demux_module.dense_{i}.{kind}" for i in of]
                yield stacked(f"demux/{stack}/dense/{part}", keys, turn=kind == "weight")
            for kind, part in (("weight", "scale"), ("bias", "bias")):
                yield stacked(f"demux/{stack}/norm/{part}", [f"{theirs}.demux_module.layer_norm_{i}.{kind}" for i in of])
    if config.demux.name == "mlp":
        yield from dense("demux/retrieval_out", "retrieval_head.dense_pre_vocab")
        yield from norm("demux/retrieval_norm", "retrieval_head.layer_norm_pre_vocab")


def classifier(config: Any) -> Iterator[Entry]:
    """The head of a task."""
    family, demux, sequence = config.model.family, config.demux.name, config.objective in SEQUENCE_OBJECTIVES
    if config.objective == "electra":
        yield from dense("replaced_head/hidden", "discriminator_predictions.dense")
        yield from dense("replaced_head/out", "discriminator_predictions.dense_prediction")
    elif not sequence and config.objective != "tagging":
        return
    elif family == "electra" and sequence:
        yield from dense("classifier/hidden", "classifier.dense")
        yield from dense("classifier/out", "classifier.out_proj")
    elif demux == "none" and sequence:
        return  # Plain BERT and RoBERTa classify a pooled state that this network does not have.
    elif family != "roberta" or demux == "none":
        yield from dense("classifier/out", "classifier")
    elif demux == "index" and not sequence:
        yield turned("classifier/out/kernel", "demultiplexer.decoder.weight")
        yield copy("classifier/out/bias", "demultiplexer.bias")
    else:
        yield from dense("classifier/hidden", "demultiplexer.dense_before_out_proj")
        if demux == "mlp":
            yield from norm("classifier/norm", "demultiplexer.layernorm_presoftmax")
        yield from dense("classifier/out", "demultiplexer.out_proj")


PLAIN_MLM = {  # Of the plain networks: dense and LayerNorm before the decoder, its bias and its matrix.
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder",
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
    "electra": (
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head.bias",
        "generator_lm_head",
    ),
}


def vocabulary(config: Any) -> Iterator[Entry]:
    """The decoder of retrieval and MLM."""
    if config.demux.name != "none":
        yield copy("decoder/bias", "retrieval_head.bias")
        decoder = "retrieval_head.decoder"
    else:
        hidden, layer_norm, bias, decoder = PLAIN_MLM[config.model.family]
        yield from dense("decoder/hidden", hidden)
        yield from norm("decoder/norm", layer_norm)
        yield copy("decoder/bias", bias)
    if not config.model.tied_decoder:
        yield turned("decoder/kernel", f"{decoder}.weight")


def entries(config: Any) -> list[Entry]:
    """All entries of the network that `config` describes."""
    found = list(encoder(config))
    if config.mux.name != "none":
        found += [*multiplexer(config), *demultiplexer(config)]
    found += classifier(config)
    if has_vocabulary_head(config):
        found += vocabulary(config)
    return found


def aliases(config: Any) -> dict[str, str]:
    """Keys of a published state dict that name the same tensor as another key: alias -> key in `entries`."""
    word = f"{FAMILIES[config.model.family].prefix}.embeddings.word_embeddings.weight"
    found = {}
    if config.demux.name == "rsa":
        shared = [key for entry in demultiplexer(config) for key in entry.theirs if key.startswith("demux_module.")]
        found = {f"{user}.{key}": key for user in ("demultiplexer", "retrieval_head") for key in shared}
    if config.demux.name == "index" and config.model.family == "roberta" and config.objective == "tagging":
        found["demultiplexer.decoder.bias"] = "demultiplexer.bias"
    if has_vocabulary_head(config):
        _, _, bias, decoder = PLAIN_MLM[config.model.family]
        if config.demux.name != "none":
            bias, decoder = "retrieval_head.bias", "retrieval_head.decoder"
        if f"{decoder}.bias" != bias:
            found[f"{decoder}.bias"] = bias
        if config.model.tied_decoder:
            found[f"{decoder}.weight"] = word
    return found
