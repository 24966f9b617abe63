"""The plain network whose hidden states are learned (objective `states`), with its parameters beside those of the network.

It has the sizes and the tokenizer of the network that learns from it; as a rule both start from the same encoder. What a run began
with lies in its checkpoints, so that it goes on even if the teacher is gone by then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamux_jax import leaves, workdir
from datamux_jax.data.formats import Format
from datamux_jax.errors import InputError, few
from datamux_jax.plan import Plan

# Parameters of equal shapes mean something else where these differ.
SAME = ("model.family", "model.layer_norm_eps", "model.num_heads")


def check(plan: Plan, teacher: Path) -> None:
    """Checks, before anything is written, that the run in the folder `teacher` can teach its hidden states.

    Raises:
      InputError: it is multiplexed, has other sizes, reads other tokens, or has no checkpoint.
    """
    config, name = plan.config, _name(plan.config)
    check_config(config, workdir.load_single(teacher, name))
    found, ours = leaves.shapes(teacher), leaves.flat(plan.abstract.params["teacher"])
    different = [
        f"{path} is {found.get(path, 'not')} there and {tuple(leaf.shape)} here"
        for path, leaf in ours.items()
        if found.get(path) != tuple(leaf.shape)
    ]
    # A bigger network would have layers that nothing here learns.
    different += [f"{path} is not here" for path in found if path.startswith("backbone/") and path not in ours]
    if different:
        index = (
            " demux.name = 'index' has tokens and positions of its own; use 'rsa' or 'mlp'."
            if config.demux.name == "index"
            else ""
        )
        raise InputError(
            f"{name} is another network than the one that is to learn its states: {few(different)}. Name one of the same sizes, such "
            f"as the encoder that the run starts from.{index}"
        )
    tokenizer = Format.load(teacher).tokenizer
    if tokenizer is None:
        raise InputError(
            f"{name} has no tokenizer beside its weights, so nobody knows which tokens it reads. Put its tokenizer.json or "
            "vocab.txt there."
        )
    if tokenizer != plan.format.tokenizer:
        raise InputError(
            f"{name} has another tokenizer than data.tokenizer = {config.data.tokenizer!r}, so its states are of other tokens. Set "
            "data.tokenizer to the teacher's folder."
        )


def check_config(config: Any, theirs: Any) -> None:
    """Raises InputError if the config `theirs` is not that of a plain network of the same kind as that of `config`."""
    if theirs.num_instances != 1:
        raise InputError(
            f"{_name(config)} mixes {theirs.num_instances} instances, but states are learned from a plain network, which reads each by "
            "itself. Name a run with num_instances = 1, or an encoder."
        )
    ours, there = (workdir.flatten(workdir.plain(one)) for one in (config, theirs))
    if different := [f"{key} = {there[key]!r} there, {ours[key]!r} here" for key in SAME if there[key] != ours[key]]:
        raise InputError(
            f"{_name(config)} is another network than the one that is to learn its states: {'; '.join(different)}. Set these keys as "
            "they are there."
        )


def load(teacher: Path, params: Any) -> Any:
    """The parameters of the run in the folder `teacher`.

    Args:
      teacher: its folder.
      params: fresh parameters of such a network, sharded.

    Returns:
      Its own, of the same shapes and shardings.

    Raises:
      InputError: no checkpoint is intact.
    """
    return leaves.nested(leaves.restored(teacher, leaves.flat(params)))


def _name(config: Any) -> str:
    return f"distill.teacher = {config.distill.teacher!r}"
