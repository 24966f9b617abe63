"""Published folders to runs and back: what `python -m launch.convert` does."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from datamux_jax import checkpoint, hf, hf_config, saved, sharding, workdir
from datamux_jax.build import HEADS, build_second, count_params, init_params
from datamux_jax.config import validate
from datamux_jax.data import cache, tokenizers
from datamux_jax.data.formats import Format
from datamux_jax.data.tokenizers import Tokenizer
from datamux_jax.errors import InputError
from datamux_jax.families import FAMILIES, published_tokens
from datamux_jax.plan import build_model
from datamux_jax.runs import load_run

SOURCE = "source.json"
TOKENIZER = "tokenizer"


def find_source(name: str, revision: str = "") -> Path:
    """The folder that `--source` names: a local one, or one downloaded from the Hugging Face hub at a pinned commit.

    Raises:
      InputError: no such folder; or the hub cannot be used.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"--source={name} is neither a folder nor a name on the Hugging Face hub (owner/name). Check the path."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"--source={name} is no folder here. To download a name from the Hugging Face hub, pip install 'datamux_jax[hub]'; or name "
            "a folder."
        ) from error
    try:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise InputError(
                f"--source={name} is downloaded at one commit only, so that it stays the same. {_current_revision(name)}"
            )
        patterns = [*hf.WEIGHTS, "config.json", *hf.TOKENIZER_FILES]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except InputError:
        raise
    except Exception as error:  # The hub client raises errors of the libraries below it.
        raise InputError(
            f"--source={name} is no folder here, and the Hugging Face hub does not give it: {type(error).__name__}. Check the name, "
            "--revision and the network, or download the folder elsewhere and name it."
        ) from error


def _current_revision(name: str) -> str:
    """How to name a commit of a repository on the hub, with today's if the hub says so."""
    import huggingface_hub

    try:
        return f"Today's is --revision={huggingface_hub.HfApi().model_info(name).sha}."
    except Exception:  # The hub client raises errors of the libraries below it.
        return "Pass it as --revision=, 40 hexadecimal digits; the hub shows it under Files and versions."


def import_run(source: Path, run: Path, base: ml_collections.ConfigDict, *, objective: str = "") -> str:
    """Writes the published checkpoint in `source` as a run without training state.

    Args:
      source: folder with `config.json` and weights.
      run: the new run's folder.
      base: the base config (`configs/common.py`).
      objective: what it is for; default: what its class was trained for. Heads of other tasks are then left out.

    Returns:
      One paragraph that says what was read.

    Raises:
      InputError: the folder does not hold such a checkpoint, or `run` is taken; nothing has been written then.
    """
    path = source / "config.json"
    published = hf.read_json(path)
    config = hf_config.to_config(published, str(path), base, objective=objective)
    validate(config)
    if saved.newest_step(run) is not None or (run / workdir.CONFIG).exists():
        raise InputError(f"--workdir={run} holds a run already. Choose a new folder; nothing was changed.")
    fmt = _format(config, published, _tokenizer(source, config, published))
    model = build_model(config, fmt)
    second = build_second(config, model)

    def make(key: jax.Array) -> Any:
        shape = (1, config.num_instances, *fmt.input_shape)
        return sharding.unbox(init_params(model, key, shape, fmt.input_dtype, second))

    fresh = jax.device_get(jax.jit(make)(jax.random.key(config.seed)))
    # A plain encoder need not have a vocabulary head; a class that was trained with one must.
    trained_for = hf_config.class_objective(published, config.model.family)
    headless = config.mux.name == "none" and (config.objective == "retrieval" or (objective == "mlm" and trained_for != "mlm"))
    may_lack = (*(("classifier/", "replaced_head/") if objective else ()), *(("decoder/",) if headless else ()))
    state = hf.read_state(source)
    dropped: list[str] = []
    if objective and trained_for and HEADS[trained_for] != HEADS[objective]:
        # Heads of two tasks can have the same names and shapes.
        dropped = sorted(key for key in state if hf.TASK_HEADS.search(key))
        state = {key: value for key, value in state.items() if key not in dropped}
    params, stayed, left_out = hf.import_state(
        state, config, fresh, str(source), may_lack=may_lack, other_heads=bool(objective)
    )
    left_out = sorted([*dropped, *left_out])
    with workdir.claimed(run, config, 4 * count_params(params) + 20_000_000):
        fmt.save(run)
        workdir.write_json(run / SOURCE, {"source": str(source), "fresh": stayed, "left_out": left_out, "config": published})
        copy_files(source, run / TOKENIZER)
        with contextlib.closing(checkpoint.Checkpoints(run, alone=True)) as saves:
            saves.save(0, params)
            saves.wait()
    kind = f"N = {config.num_instances}, {config.mux.name}, {config.demux.name}" if config.mux.name != "none" else "plain"
    notes = f" Fresh, as the checkpoint has none: {', '.join(stayed)}." if stayed else ""
    notes += f" Left out, heads of something else: {', '.join(left_out)}." if left_out else ""
    size = f"{count_params(params):,} parameters"
    return f"{source}: {config.model.family}, {kind}, objective {config.objective}, {size} -> {run}.{notes}"


def is_published(folder: Path) -> bool:
    """Whether a folder holds a published network: a `config.json` that is no run's."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(keys, dict) and not {"model", "data"} <= keys.keys()


def converted(source: Path, base: ml_collections.ConfigDict) -> Path:
    """The published network in `source` as a run in the cache, where it is made if it is not there.

    Args:
      source: folder with `config.json` and weights.
      base: a complete config; its keys that a published network does not decide come along.

    Raises:
      InputError: the folder does not hold such a network, or the cache cannot be written.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir()) if path.is_file()]
    entry = cache.folder(base.data) / "converted" / cache.digest(str(source.resolve()), files)
    run = entry / "run"
    if saved.newest_step(run) is None:
        with cache.claimed(entry, "converting these weights"):
            if saved.newest_step(run) is None:
                shutil.rmtree(run, ignore_errors=True)  # What a kill has left.
                print(import_run(source, run, _of_no_training(base)), flush=True)
    return run


def _of_no_training(base: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config without what belongs to one training: others start from the same entry of the cache."""
    config = base.copy_and_resolve_references()
    with config.unlocked():
        config.update(title="", baseline="", init_from="", resume="", retrieval_loss_coeff=0.0, task_loss_coeff=1.0)
        config.distill.teacher = ""
        config.generator.kind = "uniform"
    return config


def _format(config: Any, published: dict[str, Any], tokenizer: Tokenizer | None = None) -> Format:
    family, n = config.model.family, config.num_instances
    index = config.demux.name == "index"
    vocab_size = int(published.get("vocab_size") or FAMILIES[family].vocab_size)
    tokens = published_tokens(family, vocab_size, n, demux=config.demux.name)
    if tokenizer and config.mux.name == "none":  # An encoder with a vocabulary of its own has special tokens of its own.
        tokens = tokenizer.special_tokens(n, family)[0]
    taken = (tokens.pad + 1 if FAMILIES[family].positions_from_pads else 0) + (n + 1 if index else 0)
    return Format(
        label_names=hf_config.label_names(published),
        length=config.model.max_positions - taken,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        tokens=tokens,
        token_labels=config.objective == "tagging",
        inputs="words" if config.objective == "tagging" else "text",
    )


def _tokenizer(source: Path, config: Any, published: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint, if there is one.

    Raises:
      InputError: it cannot be read, or has more tokens than the checkpoint.
    """
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return None
    tokenizer = tokenizers.load(source)
    size = int(published.get("vocab_size") or FAMILIES[config.model.family].vocab_size)
    if tokenizer.vocab_size > size:
        raise InputError(
            f"The tokenizer in {source} has {tokenizer.vocab_size:,} tokens, but config.json says vocab_size = {size:,}. Put the "
            "tokenizer that belongs to the checkpoint there, or none."
        )
    return tokenizer


def copy_files(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, as far as there are any."""
    for name in hf.TOKENIZER_FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def export_run(run: Path, target: Path) -> str:
    """Writes the run in `run` as a folder that the published code loads.

    Returns:
      One paragraph that says what was written.

    Raises:
      InputError: the run cannot be read, the published code computes no such network, or `target` is taken.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"--to_hf={target} exists and is not an empty folder, so nothing is written there. Choose another one."
        )
    loaded = load_run(run)
    config, fmt = loaded.config, loaded.format
    if fmt.tokens is None:
        raise InputError(
            f"{run} reads feature vectors; the published code reads tokens only. Its own checkpoint is in the workdir."
        )
    published = hf_config.from_config(
        config, vocab_size=fmt.vocab_size, positions=loaded.model.num_positions, labels=fmt.label_names, pad=fmt.tokens.pad
    )
    if config.mux.name != "none" and fmt.tokens != published_tokens(config.model.family, fmt.vocab_size, config.num_instances):
        raise InputError(
            f"{run} uses other special tokens ({fmt.tokens}) than the published code of the family {config.model.family!r}, which has "
            "them written into its classes. Only a run on that family's vocabulary can be exported."
        )
    state = hf.export_state(jax.device_get(loaded.params), config)
    # Published where complete: a folder that is half written never has the name asked for.
    partial = target.with_name(target.name + workdir.TEMPORARY)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hf.write_state(partial / hf.WEIGHTS[0], state)
    workdir.write_json(partial / "config.json", published)
    copy_files(run / TOKENIZER, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    size = sum(int(np.prod(value.shape)) for value in state.values())
    return (
        f"{run} -> {target}: {published['architectures'][0]}, {len(state)} tensors, {size:,} numbers, shared ones counted under each "
        "of their names."
    )
