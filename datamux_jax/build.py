"""From a config to a network and its fresh parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from datamux_jax.backbones import BACKBONES
from datamux_jax.demux import DEMUX
from datamux_jax.errors import InputError, choose
from datamux_jax.families import FAMILIES, SpecialTokens, head_form, retrieval_start
from datamux_jax.layers import Array, Spec
from datamux_jax.model import POOLS, MultiplexedTransformer, Network
from datamux_jax.mux import MUX

# The head that an objective trains beside the vocabulary head.
HEADS = {
    "classification": "sequence",
    "regression": "sequence",
    "tagging": "token",
    "electra": "replaced",
    "retrieval": "",
    "mlm": "",
    "states": "states",
}
SEQUENCE_OBJECTIVES = ("classification", "regression")


def build(
    config: Any, *, num_classes: int, vocab_size: int, max_length: int, tokens: SpecialTokens | None = None
) -> MultiplexedTransformer:
    """Builds the network that `config` describes for a data set of the given sizes.

    Args:
      config: a complete config (`configs/common.py`).
      num_classes: of the label set.
      vocab_size: of the tokenizer; 0 for feature inputs.
      max_length: `L`.
      tokens: ids of the special tokens; None for feature inputs.

    Raises:
      InputError: an unknown name, or sizes that do not fit together.
    """
    m, n = config.model, config.num_instances
    family = FAMILIES[choose(FAMILIES, m.family, "The family model.family =")]
    spec = spec_of(config)
    mux_class = MUX[choose(MUX, config.mux.name, "The multiplexer mux.name =")]
    demux_class = DEMUX[choose(DEMUX, config.demux.name, "The demultiplexer demux.name =")]
    if config.demux.name == "index" and tokens is None:
        raise InputError(
            "demux.name = 'index' puts index tokens before every text, but the inputs are feature vectors. Use 'rsa'."
        )
    mux = demux = None
    if mux_class:
        mux = mux_class(
            spec=spec,
            num_instances=n,
            norm=config.mux.norm,
            epsilon=config.mux.epsilon,
            learned=config.mux.learned,
            mask_instances=config.objective in SEQUENCE_OBJECTIVES,
        )
    if demux_class:
        demux = demux_class(
            spec=spec,
            num_instances=n,
            num_layers=config.demux.num_layers,
            form=config.demux.form,
            tokens=tokens,
            cut=config.demux.prefix == "cut",
            keep_first=m.family == "electra" and config.objective in (*SEQUENCE_OBJECTIVES, "tagging"),
        )
    if vocab_size and m.tied_decoder and demux and spec.width != spec.hidden_size:
        raise InputError(
            f"model.embedding_size = {m.embedding_size} differs from model.hidden_size = {m.hidden_size}, but the vocabulary head is "
            "tied to the word embeddings and reads hidden states. Set model.tied_decoder = False, or embedding_size = 0."
        )
    pad_position = tokens.pad if family.positions_from_pads and tokens else None
    extra = demux.offset if demux and not demux.cut else 0
    level = HEADS[choose(HEADS, config.objective, "The objective")]
    return MultiplexedTransformer(
        spec=spec,
        num_instances=n,
        mux=mux,
        demux=demux,
        backbone=BACKBONES[choose(BACKBONES, m.backbone, "The backbone model.backbone =")](spec),
        num_positions=m.max_positions or max_length + extra + (0 if pad_position is None else pad_position + 1),
        num_classes=1 if config.objective == "regression" else num_classes,
        vocab_size=vocab_size,
        type_vocab_size=m.type_vocab_size,
        tokens=tokens,
        pad_position=pad_position,
        vocabulary_head=bool(vocab_size) and has_vocabulary_head(config),
        tied_decoder=m.tied_decoder,
        head=level,
        classifier_form=head_form(m.family, config.demux.name, level or "sequence"),
        pool=choose(POOLS, m.pool, "The pooling model.pool ="),
        retrieval_start=demux.offset if demux and demux.offset else retrieval_start(m.family, config.demux.name, level),
        logits_mib=config.logits_mib,
        attend_padding=config.mux.attend_padding,
    )


def has_vocabulary_head(config: Any) -> bool:
    """A multiplexed network retrieves; a plain one has the vocabulary head only if something trains it."""
    return config.demux.name != "none" or config.objective in ("retrieval", "mlm") or config.retrieval_loss_coeff > 0


def spec_of(config: Any) -> Spec:
    """What all layers of the network of `config` share."""
    m = config.model
    return Spec(
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        mlp_dim=m.mlp_dim,
        embedding_size=m.embedding_size,
        dropout_rate=m.dropout_rate,
        attention_dropout_rate=m.attention_dropout_rate,
        layer_norm_eps=m.layer_norm_eps,
        init_stddev=m.init_stddev,
        dtype=config.dtype,
        remat=config.remat,
        scan=config.scan_layers,
        attention=config.get("attention", "xla"),  # Older runs have none.
    )


def build_second(config: Any, model: Network) -> MultiplexedTransformer | None:
    """The second network that an objective runs beside `model`, if it has one; its parameters lie under a name of `second_name`.

    For ELECTRA, a generator of the discriminator: plain, muxed, or None (uniform random tokens). A plain generator runs on every
    instance by itself; a muxed one mixes them in the same way as the discriminator. For state distillation, the plain network of the
    same sizes, whose states are learned.
    """
    g = config.generator
    if config.objective == "states":
        assert isinstance(model, MultiplexedTransformer), "validate() refuses others"
        # Without a backward pass there is nothing to compute again for.
        spec = dataclasses.replace(model.spec, dropout_rate=0.0, attention_dropout_rate=0.0, remat="none")
        return model.clone(
            parent=None,
            spec=spec,
            num_instances=1,
            mux=None,
            demux=None,
            backbone=model.backbone.clone(parent=None, spec=spec),
            head="",
            vocabulary_head=False,
        )
    if config.objective != "electra" or g.kind == "uniform":
        return None
    assert isinstance(model, MultiplexedTransformer), "validate() refuses others"
    spec = dataclasses.replace(
        model.spec,
        hidden_size=g.hidden_size,
        num_layers=g.num_layers,
        num_heads=g.num_heads,
        mlp_dim=g.mlp_dim,
        embedding_size=g.embedding_size or model.spec.width,
        attention="xla",  # A plain one is mapped over instances, which cuDNN's attention cannot be under a mask.
    )
    plain = g.kind == "plain"
    return model.clone(
        parent=None,
        spec=spec,
        num_instances=1 if plain else model.num_instances,
        mux=None if plain or model.mux is None else model.mux.clone(parent=None, spec=spec),
        demux=None if plain or model.demux is None else model.demux.clone(parent=None, spec=spec),
        backbone=model.backbone.clone(parent=None, spec=spec),
        head="",
        num_classes=0,
        vocabulary_head=True,
        tied_decoder=plain,
        logits_mib=model.logits_mib / (model.num_instances if plain else 1),  # All passes of a plain one run at once.
    )


def second_name(second: MultiplexedTransformer) -> str:
    """Where the parameters of a second network lie: `generator`, or `teacher`, which has no head and never changes."""
    return "generator" if second.vocabulary_head else "teacher"


def shares_embeddings(model: Network, generator: MultiplexedTransformer) -> bool:
    """Generator and discriminator share the whole embedding module exactly when it has the same width (MUX-PLMs, released)."""
    return model.spec.width == generator.spec.width


def init_params(
    model: Network,
    key: Array,
    inputs_shape: tuple[int, ...],
    inputs_dtype: Any,
    second: MultiplexedTransformer | None = None,
) -> Any:
    """Fresh parameters, boxed with their logical axis names.

    Args:
      model: the network.
      key: random key.
      inputs_shape: `[B, N, L]` or `[B, N, L, F]`; `B` may be 1.
      inputs_dtype: of the inputs.
      second: from `build_second`; its parameters lie below its name, a generator's without embeddings if both share them.
    """
    inputs = jnp.zeros(inputs_shape, inputs_dtype)
    mask = jnp.ones(inputs_shape[:3], jnp.int32)
    params = model.init({"params": key}, inputs, mask)["params"]
    if second is None:
        return params
    n, name = second.num_instances, second_name(second)
    extra = dict(second.init({"params": jax.random.fold_in(key, 1)}, inputs[:, :n], mask[:, :n])["params"])
    if name == "generator" and shares_embeddings(model, second):
        del extra["embeddings"]
    return {**params, name: extra}


def count_params(params: Any) -> int:
    """Number of scalars in a parameter tree, those of a teacher left out."""
    return sum(int(x.size) for x in jax.tree.leaves({name: part for name, part in params.items() if name != "teacher"}))
