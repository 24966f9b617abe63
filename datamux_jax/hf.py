"""Published checkpoints, in and out: DataMUX and MUX-PLMs, and plain BERT, RoBERTa and ELECTRA encoders.

A published checkpoint is a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`. `hf_names.py` has the table of
names, `hf_config.py` the configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from datamux_jax import hf_names
from datamux_jax.errors import InputError, few
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

# May stand in a published file although no network here has it: buffers, the pooler, and what a plain encoder was trained with.
SURPLUS = re.compile(r"(^|\.)(position_ids|token_type_ids)$|(^|\.)pooler\.")
TASK_HEADS = re.compile(r"^(classifier|discriminator_predictions)\.")
OTHER_HEADS = re.compile(
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
            # numpy has no bfloat16, so jax reads; on the host, whatever the accelerator is.
            with jax.default_device(jax.local_devices(backend="cpu")[0]), safe_open(safe, framework="flax") as file:
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


def import_state(
    state: State,
    config: Any,
    fresh: Mapping[str, Any],
    where: str,
    *,
    may_lack: tuple[str, ...] = (),
    other_heads: bool = False,
) -> tuple[Any, list[str], list[str]]:
    """Published tensors as parameters of the network that `config` describes.

    Args:
      state: the tensors. Keys of a plain encoder may lack their family's prefix (`bert.`).
      config: complete config.
      fresh: parameters of a fresh network, for what the file may lack.
      where: name of the file, for errors.
      may_lack: prefixes of parameter paths that the file may lack; such parameters stay fresh.
      other_heads: heads of another task may lie in the file; they are left out.

    Returns:
      The parameters (numpy), the paths that stayed fresh, and the keys of heads that were left out. Heads of a plain encoder always
      are, but for the vocabulary head.

    Raises:
      InputError: keys are missing, surplus or misshapen; the first of them are listed.
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
            if not all(path.startswith(may_lack) for path in entry.ours):
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
    left_out = [key for key in state if key not in used and (plain or other_heads) and OTHER_HEADS.search(key)]
    surplus = [key for key in state if key not in used and not SURPLUS.search(key) and key not in left_out]
    if missing or surplus or misshapen:
        raise InputError(
            f"{where} does not fit the network that its config.json describes. Missing: {few(sorted(missing)) or 'nothing'}. "
            f"Surplus: {few(sorted(surplus)) or 'nothing'}. Other shapes: {few(misshapen) or 'none'}. Check that both "
            "files are of the same checkpoint; --objective names the head if config.json does not."
        )
    stayed = sorted(path for path in flat if path not in loaded)
    return flax.traverse_util.unflatten_dict({**flat, **loaded}, sep="/"), stayed, sorted(left_out)


def _settle(state: State, config: Any) -> tuple[State, list[str]]:
    """The state with its family's prefix on every encoder key, and aliases resolved; and aliases that are not the same tensor."""
    prefix = FAMILIES[config.model.family].prefix
    if config.mux.name == "none" and not any(key.startswith(f"{prefix}.") for key in state):
        bare = re.compile(r"^(embeddings|encoder|pooler|embeddings_project)\.")
        state = {f"{prefix}.{key}" if bare.match(key) else key: value for key, value in state.items()}
    # Files converted from TensorFlow, bert-base-uncased among them, have older names for the parameters of LayerNorm.
    old = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
    state = {old.sub(lambda m: "weight" if m[0] == "gamma" else "bias", key): value for key, value in state.items()}
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
