"""Compares this project with input/output pairs of the published PyTorch modules.

    python -m tests.golden --dir=tests/golden_pairs

Every `NAME.json` / `NAME.npz` pair of the folder is one evaluation-mode forward pass of a published module. Its weights are a pure
function of their names; here they go through the importer like a downloaded checkpoint. Exit code 1 if an output differs by more
than 1e-5 in float32, or a pair cannot be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import common
from datamux_jax import hf, hf_config, losses, sharding
from datamux_jax.build import SEQUENCE_OBJECTIVES, build, init_params
from datamux_jax.families import published_tokens
from datamux_jax.model import call
from datamux_jax.mux import chunk_masks

TOLERANCE = 1e-5
FAMILIES = {"datamux": "roberta", "muxbert": "bert", "muxelectra": "electra"}
OBJECTIVES = {"sequence": "classification", "token": "tagging", "mlm": "mlm", "rtd": "electra"}
U64 = np.uint64


def uniform(name: str, size: int) -> np.ndarray:
    """`size` numbers in [0, 1) that depend on `name` alone: SplitMix64 over a counter."""
    with np.errstate(over="ignore"):
        x = np.arange(size, dtype=U64) + (U64(zlib.crc32(name.encode("utf-8"))) << U64(32))
        x += U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
        x ^= x >> U64(31)
    return (x >> U64(40)).astype(np.float64) / 2**24


def fill(pair: dict) -> hf.State:
    """The state dict that a pair's manifest describes."""
    state = {}
    for key, rule in pair["state"].items():
        shape = tuple(rule["shape"])
        if "built" in rule:
            state[key] = np.asarray(chunk_masks(pair["binary_hadamard_epsilon"])(jax.random.key(0), shape))
        elif "alias_of" not in rule:
            values = rule["offset"] + rule["scale"] * (2 * uniform(key, int(np.prod(shape))) - 1)
            state[key] = values.astype(np.float32).reshape(shape)
    return state | {key: state[rule["alias_of"]] for key, rule in pair["state"].items() if "alias_of" in rule}


def published_config(pair: dict) -> dict:
    """The `config.json` that would lie beside such a checkpoint."""
    family = FAMILIES[pair["family"]]
    objective = OBJECTIVES[pair["task"]]
    classes = hf_config.ARCHITECTURES[family, True]
    return {
        "architectures": [next(name for name, there in classes.items() if there == objective)],
        "model_type": family,
        "num_hidden_layers": pair["num_layers"],
        "num_attention_heads": pair["num_heads"],
        "muxing_variant": pair["mux"],
        "demuxing_variant": pair["demux"],
        "type_vocab_size": pair["state"][f"{family}.embeddings.token_type_embeddings.weight"]["shape"][0],
        **{key: value for key, value in pair.items() if key not in ("state", "name", "family", "task", "mux", "demux")},
    }


def run(pair: dict, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute error of every output of a pair."""
    published = published_config(pair)
    config = hf_config.to_config(published, pair["name"], common.get_config())
    n, vocab_size = config.num_instances, pair["vocab_size"]
    tokens = published_tokens(config.model.family, vocab_size, n, demux=config.demux.name)
    length = data["input_ids"].shape[1]
    model = build(config, num_classes=pair["num_labels"], vocab_size=vocab_size, max_length=length, tokens=tokens)
    shapes = jax.eval_shape(lambda key: init_params(model, key, (1, n, length), "int32"), jax.random.key(0))
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sharding.unbox(shapes))
    params, stayed, _ = hf.import_state(fill(pair), config, fresh, pair["name"])
    assert not stayed, f"not in the checkpoint: {stayed}"

    def grouped(name: str, fillers: str) -> jax.Array:
        rows = data[name]
        extra = rows[data[fillers]] if fillers in data else rows[:0]
        return jnp.asarray(np.concatenate([rows, extra]).reshape(-1, n, *rows.shape[1:]))

    rows = len(data["input_ids"])
    ids, mask = grouped("input_ids", "dummy_rows_for_ids"), grouped("attention_mask", "dummy_rows_for_mask")
    labels = grouped("labels", "dummy_rows_for_ids")
    weight = (jnp.arange(ids.shape[0] * n) < rows).astype(jnp.float32).reshape(-1, n)
    batch = {"inputs": ids, "mask": mask, "label": labels, "weight": weight}

    room = int((labels != losses.NO_LABEL).sum((1, 2)).max()) if pair["task"] == "mlm" else 0
    pads_count = pair["task"] in ("mlm", "rtd")
    compute = jax.jit(lambda params: forward(model, config, params, batch, data["retrieval_instances"], room, pads_count))
    outputs = {name: np.asarray(value) for name, value in compute(params).items()}
    if pair["task"] == "mlm":
        outputs |= scattered(model.offset, np.asarray(labels), outputs)
    else:
        for name in ("logits", "demuxed"):
            outputs[name] = outputs[name].reshape(-1, *outputs[name].shape[2:])
        outputs["logits"] = outputs["logits"][:rows]
    outputs["loss"] = config.task_loss_coeff * outputs["task_loss"] + config.retrieval_loss_coeff * outputs["retrieval_loss"]
    errors = {}
    for name in ("logits", "logits_at_masked", "demuxed", "task_loss", "retrieval_loss", "loss"):
        if name in data:
            ours = np.asarray(outputs[name])
            errors[name] = float(np.max(np.abs(ours.reshape(data[name].shape) - data[name])))
    return errors


def forward(model, config, params, batch: dict, instances: np.ndarray, room: int, pads_count: bool) -> dict:
    """States, logits and losses of one pass, with the recorded draws in the place of random ones."""
    h = call(model, params, "encode", batch["inputs"], batch["mask"])
    out = {}
    if config.objective in SEQUENCE_OBJECTIVES:
        out["demuxed"] = call(model, params, "features", h, batch["mask"])
        out["logits"] = call(model, params, "classify", h, batch["mask"])
        loss_of = losses.regression_loss if config.objective == "regression" else losses.classification_loss
        out["task_loss"] = losses.mean(loss_of(model, params, h, batch, {}, False)[0], "task_loss")
    elif config.objective == "mlm":
        label = batch["label"]
        sums, parts = losses.chosen_tokens_loss(
            model, params, h, jnp.maximum(label, 0), label != losses.NO_LABEL, room, {}, False
        )
        out["task_loss"] = losses.mean(sums, "mlm_loss")
        out |= dict(zip(("instance", "position", "weight"), parts[1:], strict=True))
        out["chosen_logits"] = call(model, params, "predict_tokens", h, parts[1], parts[2] + model.offset)
    else:
        tagging = config.objective == "tagging"
        out["demuxed"] = model.apply({"params": params}, h, method=lambda m, h: m.demux(h))
        out["logits"] = call(model, params, "tag" if tagging else "replaced", h)
        if tagging:
            out["task_loss"] = losses.mean(
                losses.tagging_loss(model, params, h, labelled(batch, config), {}, False)[0], "task_loss"
            )
        else:
            # The published discriminator, run by itself, compares all fed positions, prefix included, with labels that were not moved.
            whole = model.apply({"params": params}, out["demuxed"], method=lambda m, x: m.replaced_head(x))
            loss = optax.sigmoid_binary_cross_entropy(whole, batch["label"].astype(jnp.float32))
            weight = batch["mask"].astype(jnp.float32)
            out["task_loss"] = (loss * weight).sum() / weight.sum()
    # Instances were recorded only where a position can carry a loss.
    fed = model.feed(batch["inputs"])
    instance = jnp.zeros((fed.shape[0], fed.shape[2]), jnp.int32)
    instance = instance.at[:, fed.shape[2] - instances.shape[1] :].set(instances)
    drawn = losses.asked(model, fed, instance, pads_count=pads_count)
    out["retrieval_loss"] = losses.mean(losses.retrieval_loss(model, params, h, drawn, {}, False), "retrieval_loss")
    return out


def labelled(batch: dict, config) -> dict:
    """DataMUX also leaves out labels at padding; there are none in real data."""
    if config.model.family != "roberta":
        return batch
    return {**batch, "label": jnp.where(batch["mask"] == 1, batch["label"], losses.NO_LABEL)}


def scattered(offset: int, label: np.ndarray, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MLM logits as the published module returns them: `[B*N, L, V]`, zero where there is no label."""
    groups, n, length = label.shape
    full = np.zeros((groups, n, length, outputs["chosen_logits"].shape[-1]), np.float32)
    for b, p in np.argwhere(outputs["weight"] > 0):
        full[b, outputs["instance"][b, p], outputs["position"][b, p] + offset] = outputs["chosen_logits"][b, p]
    full = full.reshape(groups * n, length, -1)
    moved = np.full((groups * n, length), losses.NO_LABEL)
    moved[:, offset:] = label.reshape(groups * n, length)[:, : length - offset]
    return {"logits": full, "logits_at_masked": full[moved != losses.NO_LABEL]}


def pairs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.with_suffix(".npz").exists())


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(path.with_suffix(".npz")) as data:
        return json.loads(path.read_text(encoding="utf-8")), dict(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="folder with NAME.json / NAME.npz pairs")
    folder = parser.parse_args().dir
    jax.config.update("jax_default_matmul_precision", "highest")
    failed = 0
    found = sorted(folder.glob("*.json"))
    if not found:
        parser.error(f"--dir={folder} holds no NAME.json, or does not exist")
    for path in found:
        try:
            errors = run(*load(path))
            bad = [name for name, error in errors.items() if not error <= TOLERANCE]
            text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
        except Exception as error:
            bad, text = ["run"], f"cannot be run: {type(error).__name__}: {error}"
        failed += bool(bad)
        print(f"{'FAIL' if bad else 'ok  '}  {path.stem:45s}  {text}", flush=True)
    print(f"{len(found) - failed} of {len(found)} pairs within {TOLERANCE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
