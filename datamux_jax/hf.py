"""Published checkpoints, in and out: DataMUX and MUX-PLMs, and plain BERT, RoBERTa and ELECTRA encoders.

A published checkpoint is a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`. `hf_names.py` has the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import ml_collections
import numpy as np

from datamux_jax import hf_names
from datamux_jax.build import SEQUENCE_OBJECTIVES
from datamux_jax.errors import InputError
from datamux_jax.families import FAMILIES

State = dict[str, np.ndarray]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)

MUX_NAMES = {  # Published name -> ours.
    "gaussian_hadamard": "gaussian_hadamard",
    "binary_hadamard": "binary_hadamard",
    "random_ortho": "random_ortho",
    "random_ortho_low_rank": "random_ortho_low_rank",
    "gaussian_attention_v2": "contextual",
    "gaussian_attention": "gaussian_attention",
}
DEMUX_NAMES = {"index": "index", "index_pos": "rsa", "mlp": "mlp"}

# The class of the published code for a family and an objective; the first one is what export writes.
ARCHITECTURES: dict[tuple[str, bool], dict[str, str]] = {  # (family, multiplexed) -> class -> objective
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
# What the published code can be built with.
PUBLISHED_MUX = {
    "bert": ("gaussian_hadamard", "binary_hadamard", "random_ortho", "random_ortho_low_rank", "contextual"),
    "electra": ("gaussian_hadamard", "binary_hadamard", "random_ortho", "random_ortho_low_rank", "gaussian_attention"),
    "roberta": ("gaussian_hadamard", "binary_hadamard", "random_ortho"),
}
PUBLISHED_DEMUX = {"bert": ("rsa", "index"), "electra": ("rsa", "index"), "roberta": ("index", "mlp")}

# May stand in a published file although no network here has it: buffers, the pooler, and what a plain encoder was trained with.
SURPLUS = re.compile(r"(^|\.)(position_ids|token_type_ids)$|(^|\.)pooler\.")
HEADS_OF_PLAIN = re.compile(
    r"^(cls|lm_head|classifier|qa_outputs|discriminator_predictions|generator_predictions|generator_lm_head)\."
)


def read_json(path: Path) -> dict[str, Any]:
    """A `config.json`.

    Raises:
      InputError: it is missing, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent} has no {path.name}. A published checkpoint is a folder with {path.name} and {' or '.join(WEIGHTS)}."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object. Download it again.")
    return value


def read_state(folder: Path) -> State:
    """The tensors of a published folder, float32.

    Raises:
      InputError: there are none, or they cannot be read. `.bin` files need torch, which loads weights only: nothing is unpickled but
        tensors.
    """
    safe, pickled = (folder / name for name in WEIGHTS)
    if safe.exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(safe, framework="flax") as file:
                return {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys() if _is_weight(file, key)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{safe} is no complete safetensors file: {error}. Download it again.") from error
    if not pickled.exists():
        raise InputError(f"{folder} has neither {' nor '.join(WEIGHTS)}. Name the folder of a published checkpoint.")
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{pickled} can be read only with torch, which is not installed. Install it with pip install 'datamux_jax[torch]', or "
            "convert the file to model.safetensors where torch is at hand."
        ) from error
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        return {key: value.float().numpy() for key, value in state.items() if value.is_floating_point()}
    except Exception as error:  # The loader has no error of its own for damaged or unsafe files.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{pickled} cannot be read as a file of plain weights: {reason} Files that hold anything else are refused; download it "
            "again, or get model.safetensors."
        ) from error


def _is_weight(file: Any, key: str) -> bool:
    return file.get_slice(key).get_dtype() in ("F64", "F32", "F16", "BF16")


def write_state(path: Path, state: State) -> None:
    """Writes `model.safetensors`."""
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path, metadata={"format": "pt"})


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


def to_config(published: Mapping[str, Any], where: str, *, objective: str = "") -> ml_collections.ConfigDict:
    """The config of the network that a published `config.json` describes.

    Args:
      published: its contents.
      where: its name, for errors.
      objective: what the network is for; default: what its class in `architectures` was trained for. A plain encoder class
        (`BertModel`) has none, and becomes a config without heads: objective `retrieval`.

    Raises:
      InputError: a key is missing, or has a value that this project does not compute.
    """
    from configs import common

    config = common.get_config()
    family = family_of(published, where)
    known = FAMILIES[family]
    multiplexed = "muxing_variant" in published and int(published.get("num_instances", 1)) >= 1

    def get(key: str) -> Any:
        if key not in published:
            raise InputError(
                f"{where} has no key {key!r}, which a {family} checkpoint needs. Add it by hand if you know its value."
            )
        return published[key]

    if published.get("hidden_act", "gelu") != "gelu" or published.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(
            f"{where} asks for hidden_act = {published.get('hidden_act')!r} and position_embedding_type = "
            f"{published.get('position_embedding_type')!r}; only 'gelu' (exact) and 'absolute' are computed here."
        )
    if published.get("retrieval_loss_vocab_scale", 1) != 1:
        raise InputError(
            f"{where} has retrieval_loss_vocab_scale = {published['retrieval_loss_vocab_scale']}; only 1 is computed here."
        )
    hidden = get("hidden_size")
    embedding = published.get("embedding_size", hidden)
    config.model.update(
        family=family,
        hidden_size=hidden,
        num_layers=get("num_hidden_layers"),
        num_heads=get("num_attention_heads"),
        mlp_dim=get("intermediate_size"),
        embedding_size=0 if embedding == hidden else embedding,
        max_positions=get("max_position_embeddings"),
        type_vocab_size=published.get("type_vocab_size", known.type_vocab_size),
        dropout_rate=float(published.get("hidden_dropout_prob", 0.1)),
        attention_dropout_rate=float(published.get("attention_probs_dropout_prob", 0.1)),
        layer_norm_eps=float(published.get("layer_norm_eps", known.layer_norm_eps)),
        init_stddev=float(published.get("initializer_range", 0.02)),
        tied_decoder=(known.tied_decoder or not multiplexed) and bool(published.get("tie_word_embeddings", True)),
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
    if config.objective == "classification" and _num_labels(published) == 1:
        config.objective = "regression"
    if multiplexed:
        _to_mux_config(config, published, where)
    return config


def _to_mux_config(config: ml_collections.ConfigDict, published: Mapping[str, Any], where: str) -> None:
    family = config.model.family
    for key, table in (("muxing_variant", MUX_NAMES), ("demuxing_variant", DEMUX_NAMES)):
        if published.get(key) not in table:
            raise InputError(f"{where} has {key} = {published.get(key)!r}, which is none of {', '.join(table)}.")
    config.num_instances = int(published["num_instances"])
    config.retrieval_percentage = float(published.get("retrieval_percentage", 1.0))
    config.retrieval_loss_coeff = float(published.get("retrieval_loss_coeff", 0.1))
    config.task_loss_coeff = float(published.get("task_loss_coeff", 0.9))
    config.mux.update(
        name=MUX_NAMES[published["muxing_variant"]],
        norm=float(published.get("gaussian_hadamard_norm", 1.0)),
        epsilon=float(published.get("binary_hadamard_epsilon") or 0.0),
        learned=bool(published.get("learn_muxing", False)),
    )
    config.demux.update(
        name=DEMUX_NAMES[published["demuxing_variant"]],
        num_layers=int(published.get("num_hidden_demux_layers", 2)),
        form="electra" if family == "electra" else "bert",
        prefix="cut" if config.objective in ("mlm", "electra") and family != "roberta" else "extend",
    )


def _num_labels(published: Mapping[str, Any]) -> int:
    return len(published["id2label"]) if "id2label" in published else int(published.get("num_labels", 2))


def label_names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a published config, in order."""
    names = published.get("id2label") or {str(i): f"LABEL_{i}" for i in range(_num_labels(published))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def import_state(
    state: State, config: Any, fresh: Mapping[str, Any], where: str, *, may_lack: tuple[str, ...] = ()
) -> tuple[Any, list[str]]:
    """Published tensors as parameters of the network that `config` describes.

    Args:
      state: the tensors. Keys of a plain encoder may lack their family's prefix (`bert.`).
      config: complete config.
      fresh: parameters of a fresh network, for what the file may lack.
      where: name of the file, for errors.
      may_lack: prefixes of parameter paths that the file may lack; such parameters stay fresh.

    Returns:
      The parameters (numpy), and the paths that stayed fresh.

    Raises:
      InputError: keys are missing, surplus or misshapen; all are listed.
    """
    flat = flax.traverse_util.flatten_dict(dict(fresh), sep="/")
    state, twins = _settle(state, config)
    plain = config.mux.name == "none"
    missing: list[str] = []
    misshapen, used, loaded = list(twins), set[str](), dict[str, np.ndarray]()
    for entry in hf_names.entries(config):
        used.update(entry.theirs)
        absent = [key for key in entry.theirs if key not in state]
        if absent:
            if not all(path.startswith(may_lack) for path in entry.ours) or not may_lack:
                missing += absent
            continue
        arrays = [state[key] for key in entry.theirs]
        wanted = entry.to_theirs([np.zeros(flat[path].shape, np.float32) for path in entry.ours])
        wrong = [
            f"{key} is {list(a.shape)} there and {list(w.shape)} here"
            for key, a, w in zip(entry.theirs, arrays, wanted, strict=True)
            if a.shape != w.shape
        ]
        misshapen += wrong
        if not wrong:
            loaded.update(zip(entry.ours, map(np.ascontiguousarray, entry.to_ours(arrays)), strict=True))
    surplus = [
        key for key in state if key not in used and not SURPLUS.search(key) and not (plain and HEADS_OF_PLAIN.search(key))
    ]
    if missing or surplus or misshapen:
        raise InputError(
            f"{where} does not fit the network that its config.json describes. Missing: {', '.join(sorted(missing)) or 'nothing'}. "
            f"Surplus: {', '.join(sorted(surplus)) or 'nothing'}. Other shapes: {'; '.join(misshapen) or 'none'}. Check that both "
            "files are of the same checkpoint; --objective names the head if config.json does not."
        )
    stayed = sorted(path for path in flat if path not in loaded)
    return flax.traverse_util.unflatten_dict({**flat, **loaded}, sep="/"), stayed


def _settle(state: State, config: Any) -> tuple[State, list[str]]:
    """The state with its family's prefix on every encoder key, and aliases resolved; and aliases that are not the same tensor."""
    prefix = FAMILIES[config.model.family].prefix
    if config.mux.name == "none" and not any(key.startswith(f"{prefix}.") for key in state):
        bare = re.compile(r"^(embeddings|encoder|pooler|embeddings_project)\.")
        state = {f"{prefix}.{key}" if bare.match(key) else key: value for key, value in state.items()}
    settled, twins = dict(state), []
    for alias, key in hf_names.aliases(config).items():
        if alias not in settled:
            continue
        value = settled.pop(alias)
        if not np.array_equal(settled.setdefault(key, value), value):
            twins.append(f"{alias} and {key} differ, but should be one tensor")
    return settled, twins


def export_state(params: Mapping[str, Any], config: Any) -> State:
    """Parameters under their published names, aliases included, as the published classes save them."""
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    state: State = {}
    for entry in hf_names.entries(config):
        arrays = entry.to_theirs([np.asarray(flat[path], np.float32) for path in entry.ours])
        state.update(zip(entry.theirs, map(np.ascontiguousarray, arrays), strict=True))
    return {**state, **{alias: state[key] for alias, key in hf_names.aliases(config).items()}}


def from_config(config: Any, *, vocab_size: int, positions: int, labels: tuple[str, ...], pad: int) -> dict[str, Any]:
    """The published `config.json` of a network.

    Raises:
      InputError: the published code has no class for it.
    """
    m, multiplexed = config.model, config.mux.name != "none"
    objective = {"regression": "classification", "retrieval": "mlm"}.get(config.objective, config.objective)
    names = [name for name, there in ARCHITECTURES[m.family, multiplexed].items() if there == objective]
    problem = (
        "" if names else f"no {'multiplexed' if multiplexed else 'plain'} {m.family} class for objective = {config.objective!r}"
    )
    if multiplexed and config.mux.name not in PUBLISHED_MUX[m.family]:
        problem = f"no {m.family} class with the multiplexer {config.mux.name!r}"
    if multiplexed and config.demux.name not in PUBLISHED_DEMUX[m.family]:
        problem = f"no {m.family} class with the demultiplexer {config.demux.name!r}"
    if config.demux.name == "rsa" and config.demux.form != ("electra" if m.family == "electra" else "bert"):
        problem = f"another rsa stack than demux.form = {config.demux.form!r} in its {m.family} classes"
    if config.objective in SEQUENCE_OBJECTIVES and m.pool != "first":
        problem = f"no pooling like model.pool = {m.pool!r}; it reads the first position"
    if multiplexed and m.tied_decoder != FAMILIES[m.family].tied_decoder:
        problem = f"no {m.family} class with tied_decoder = {m.tied_decoder}"
    if not m.type_vocab_size:
        problem = "no class without token types (model.type_vocab_size = 0)"
    if problem:
        raise InputError(
            f"This network cannot be exported: the published code has {problem}. Its own checkpoint is in the workdir."
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
