"""Configs of published checkpoints (`config.json`), in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from datamux_jax.build import SEQUENCE_OBJECTIVES
from datamux_jax.errors import InputError
from datamux_jax.families import FAMILIES

MUX_NAMES = {  # Published name -> ours.
    "gaussian_hadamard": "gaussian_hadamard",
    "binary_hadamard": "binary_hadamard",
    "random_ortho": "random_ortho",
    "random_ortho_low_rank": "random_ortho_low_rank",
    "gaussian_attention_v2": "contextual",
    "gaussian_attention": "gaussian_attention",
}
DEMUX_NAMES = {"index": "index", "index_pos": "rsa", "mlp": "mlp"}

# Classes of the published code, and of transformers for plain networks: (family, multiplexed) -> class -> objective. Of several for
# one objective, the first one is what export writes.
ARCHITECTURES: dict[tuple[str, bool], dict[str, str]] = {
    ("bert", True): {
        "MuxedBertForMaskedLM": "mlm",
        "MuxedBertForSequenceClassification": "classification",
        "MuxedBertForTokenClassification": "tagging",
    },
    ("electra", True): {
        "MuxedElectraForPreTraining": "electra",
        "MuxedElectraForMaskedLM": "mlm",
        "MuxedElectraForSequenceClassification": "classification",
        "MuxedElectraForTokenClassification": "tagging",
    },
    ("roberta", True): {
        "RobertaSequenceClassificationMuxed": "classification",
        "RobertaTokenClassificationMuxed": "tagging",
    },
    ("bert", False): {"BertForMaskedLM": "mlm", "BertForPreTraining": "mlm", "BertForTokenClassification": "tagging"},
    ("roberta", False): {"RobertaForMaskedLM": "mlm", "RobertaForTokenClassification": "tagging"},
    ("electra", False): {
        "ElectraForPreTraining": "electra",
        "ElectraForMaskedLM": "mlm",
        "ElectraForTokenClassification": "tagging",
        "ElectraForSequenceClassification": "classification",
    },
}
PLAIN_CLASS = re.compile(r"^(Bert|Roberta|Electra)(Model|For\w+)$")
# Multiplexers that each class can be built with, and demultiplexers of each family.
_USUAL = ("gaussian_hadamard", "binary_hadamard", "random_ortho", "random_ortho_low_rank")
PUBLISHED_MUX = {
    "MuxedBertForMaskedLM": (*_USUAL, "contextual"),
    "MuxedBertForSequenceClassification": (*_USUAL, "contextual"),
    "MuxedBertForTokenClassification": (*_USUAL, "contextual"),
    "MuxedElectraForPreTraining": (*_USUAL, "gaussian_attention"),
    "MuxedElectraForMaskedLM": _USUAL,
    "MuxedElectraForSequenceClassification": _USUAL,
    "MuxedElectraForTokenClassification": _USUAL,
    "RobertaSequenceClassificationMuxed": _USUAL,
    "RobertaTokenClassificationMuxed": _USUAL[:3],
}
PUBLISHED_DEMUX = {"bert": ("rsa", "index"), "electra": ("rsa", "index"), "roberta": ("index", "mlp")}


def family_of(published: Mapping[str, Any], where: str) -> str:
    """The family that a published `config.json` names.

    Raises:
      InputError: none of ours.
    """
    kind = str(published.get("model_type", ""))
    for name in (kind, *(published.get("architectures") or ())):
        for family in ("roberta", "electra", "bert"):
            if name.lower().removeprefix("muxed").startswith(family):
                return family
    raise InputError(
        f"{where} says model_type = {kind!r} and architectures = {published.get('architectures')!r}, which is none of "
        f"{', '.join(FAMILIES)}. Other families cannot be imported."
    )


def is_multiplexed(published: Mapping[str, Any]) -> bool:
    """Whether a published config is of a multiplexed network.

    The published baselines are plain classes, although their configs carry the multiplexing keys: the class decides.
    """
    names = published.get("architectures") or ()
    return "muxing_variant" in published and not any(PLAIN_CLASS.match(name) for name in names)


def class_objective(published: Mapping[str, Any], family: str) -> str:
    """What the class in a published config was trained for; "" for none that is known, such as a plain encoder."""
    classes = ARCHITECTURES[family, is_multiplexed(published)]
    return next((classes[name] for name in published.get("architectures") or () if name in classes), "")


def to_config(
    published: Mapping[str, Any], where: str, base: ml_collections.ConfigDict, *, objective: str = ""
) -> ml_collections.ConfigDict:
    """The config of the network that a published `config.json` describes.

    Args:
      published: its contents.
      where: its name, for errors.
      base: the base config (`configs/common.py`).
      objective: what the network is for; default: what its class in `architectures` was trained for. A plain encoder class
        (`BertModel`) has none, and becomes a config without heads: objective `retrieval`.

    Raises:
      InputError: a key is missing, or has a value that this project does not compute.
    """
    config = base.copy_and_resolve_references()
    family = family_of(published, where)
    known = FAMILIES[family]
    multiplexed = is_multiplexed(published)

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = published.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(
                f"{where} has no key {key!r}, which a {family} checkpoint needs. Add it by hand if you know its value."
            )
        if not isinstance(value, int | float) or (kind is int and value != int(value)):
            raise InputError(f"{where} has {key} = {value!r}, which is no {'whole ' if kind is int else ''}number. Correct it.")
        return kind(value)

    if (
        get_text(published, "hidden_act", "gelu") != "gelu"
        or get_text(published, "position_embedding_type", "absolute") != "absolute"
    ):
        raise InputError(
            f"{where} asks for hidden_act = {published.get('hidden_act')!r} and position_embedding_type = "
            f"{published.get('position_embedding_type')!r}; only 'gelu' (exact) and 'absolute' are computed here."
        )
    if get("retrieval_loss_vocab_scale", float, 1) != 1:
        raise InputError(
            f"{where} has retrieval_loss_vocab_scale = {published['retrieval_loss_vocab_scale']}; only 1 is computed here."
        )
    hidden = get("hidden_size", int)
    embedding = get("embedding_size", int, hidden)
    config.model.update(
        family=family,
        hidden_size=hidden,
        num_layers=get("num_hidden_layers", int),
        num_heads=get("num_attention_heads", int),
        mlp_dim=get("intermediate_size", int),
        embedding_size=0 if embedding == hidden else embedding,
        max_positions=get("max_position_embeddings", int),
        type_vocab_size=get("type_vocab_size", int, known.type_vocab_size),
        dropout_rate=get("hidden_dropout_prob", float, 0.1),
        attention_dropout_rate=get("attention_probs_dropout_prob", float, 0.1),
        layer_norm_eps=get("layer_norm_eps", float, known.layer_norm_eps),
        init_stddev=get("initializer_range", float, 0.02),
        tied_decoder=(known.tied_decoder or not multiplexed) and published.get("tie_word_embeddings") is not False,
        pool="first",
    )
    classes = ARCHITECTURES[family, multiplexed]
    named = [classes[name] for name in published.get("architectures") or () if name in classes]
    if not objective and multiplexed and not named:
        raise InputError(
            f"{where} has architectures = {published.get('architectures')!r}, which is none of the published classes "
            f"{', '.join(classes)}. Say with --objective what the checkpoint is for."
        )
    config.objective = objective or (named[0] if named else "retrieval")
    if config.objective == "classification" and len(label_names(published)) == 1:
        config.objective = "regression"
    if not multiplexed:
        config.num_instances, config.mux.name, config.demux.name = 1, "none", "none"
        return config
    for key, table in (("muxing_variant", MUX_NAMES), ("demuxing_variant", DEMUX_NAMES)):
        if published.get(key) not in table:
            raise InputError(f"{where} has {key} = {published.get(key)!r}, which is none of {', '.join(table)}.")
    config.num_instances = get("num_instances", int)
    config.retrieval_percentage = get("retrieval_percentage", float, 1.0)
    config.retrieval_loss_coeff = get("retrieval_loss_coeff", float, 0.1)
    config.task_loss_coeff = get("task_loss_coeff", float, 0.9)
    config.mux.update(
        name=MUX_NAMES[published["muxing_variant"]],
        norm=get("gaussian_hadamard_norm", float, 1.0),
        epsilon=get("binary_hadamard_epsilon", float, 0.0),
        learned=bool(published.get("learn_muxing")),
        attend_padding=True,
    )
    config.demux.update(
        name=DEMUX_NAMES[published["demuxing_variant"]],
        num_layers=get("num_hidden_demux_layers", int, 2),
        form="electra" if family == "electra" else "bert",
        prefix="cut" if config.objective in ("mlm", "electra") and family != "roberta" else "extend",
    )
    return config


def get_text(published: Mapping[str, Any], key: str, default: str) -> str:
    return default if published.get(key) is None else str(published[key])


def label_names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a published config, in order."""
    names = published.get("id2label") or {str(i): f"LABEL_{i}" for i in range(int(published.get("num_labels") or 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def from_config(config: Any, *, vocab_size: int, positions: int, labels: tuple[str, ...], pad: int) -> dict[str, Any]:
    """The published `config.json` of a network.

    Raises:
      InputError: the published code has no class for it.
    """
    m, multiplexed = config.model, config.mux.name != "none"
    objective = {"regression": "classification", "retrieval": "mlm", "states": "mlm"}.get(config.objective, config.objective)
    names = [name for name, there in ARCHITECTURES[m.family, multiplexed].items() if there == objective]
    problem = _unpublished(config, names)
    if problem:
        raise InputError(
            f"This network cannot be exported: the published code has {problem}. Train with the published settings, for rsa demux.form "
            f"= {'electra' if m.family == 'electra' else 'bert'!r}; or use the run as it is."
        )
    published: dict[str, Any] = {
        "architectures": names[:1],
        "model_type": m.family,
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_dim,
        "hidden_act": "gelu",
        "max_position_embeddings": positions,
        "type_vocab_size": m.type_vocab_size,
        "vocab_size": vocab_size,
        "hidden_dropout_prob": m.dropout_rate,
        "attention_probs_dropout_prob": m.attention_dropout_rate,
        "layer_norm_eps": m.layer_norm_eps,
        "initializer_range": m.init_stddev or 0.02,
        "pad_token_id": pad,
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    if not multiplexed:
        published["tie_word_embeddings"] = m.tied_decoder
    if m.family == "electra":
        published["embedding_size"] = m.embedding_size or m.hidden_size
    if multiplexed:
        published |= {
            "num_instances": config.num_instances,
            "muxing_variant": {ours: theirs for theirs, ours in MUX_NAMES.items()}[config.mux.name],
            "demuxing_variant": {ours: theirs for theirs, ours in DEMUX_NAMES.items()}[config.demux.name],
            "retrieval_percentage": config.retrieval_percentage,
            "retrieval_loss_coeff": config.retrieval_loss_coeff,
            "task_loss_coeff": config.task_loss_coeff,
            "gaussian_hadamard_norm": config.mux.norm,
            "binary_hadamard_epsilon": config.mux.epsilon,
            "learn_muxing": config.mux.learned,
            "num_hidden_demux_layers": config.demux.num_layers,
            "retrieval_loss_vocab_scale": 1,
        }
    return published


def _unpublished(config: Any, names: list[str]) -> str:
    """Why no published class is this network; empty if there is one."""
    m, multiplexed = config.model, config.mux.name != "none"
    kind = "multiplexed" if multiplexed else "plain"
    if not names:
        return f"no {kind} {m.family} class for objective = {config.objective!r}"
    if multiplexed and config.mux.name not in PUBLISHED_MUX[names[0]]:
        return f"no class {names[0]} with the multiplexer {config.mux.name!r}"
    if "ortho" in config.mux.name and m.embedding_size not in (0, m.hidden_size):
        return f"no {config.mux.name} at the width model.embedding_size = {m.embedding_size}: it mixes at the hidden size only"
    if multiplexed and not config.mux.attend_padding:
        return "no class whose attention leaves padding out (mux.attend_padding = False)"
    if multiplexed and config.demux.name not in PUBLISHED_DEMUX[m.family]:
        return f"no {m.family} class with the demultiplexer {config.demux.name!r}"
    if config.demux.name == "rsa" and config.demux.form != ("electra" if m.family == "electra" else "bert"):
        return f"another rsa stack than demux.form = {config.demux.form!r} in its {m.family} classes"
    if config.objective in SEQUENCE_OBJECTIVES and m.pool != "first":
        return f"no pooling like model.pool = {m.pool!r}; it reads the first position"
    cuts = config.objective in ("mlm", "electra", "retrieval", "states")
    if config.demux.name == "index" and (config.demux.prefix == "cut") != cuts:
        return f"no class for objective = {config.objective!r} with demux.prefix = {config.demux.prefix!r}"
    if multiplexed and m.tied_decoder != FAMILIES[m.family].tied_decoder:
        return f"no {m.family} class with tied_decoder = {m.tied_decoder}"
    if not m.type_vocab_size:
        return "no class without token types (model.type_vocab_size = 0)"
    return ""
