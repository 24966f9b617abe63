"""What `init=` names, for the configs that can start from weights: the sizes that come with it."""

import json

from datamux_jax import packaged
from datamux_jax.errors import InputError


def take(c, init: str, size: str, n: tuple[int, ...]) -> dict:
    """Gives `c` the sizes of the network that `init` names.

    Args:
      c: the config.
      init: the folder of a run or of a published encoder, or the name of a package.
      size: of a network from scratch; none may be asked for beside `init`.
      n: numbers of instances that are to start from it.

    Returns:
      The keys, beside those of the network, that a run must have to start from it: `init_from`, and how a network mixes that does.

    Raises:
      InputError: it cannot be read, has sizes of its own, or mixes another number of instances.
    """
    if size:
        raise InputError(f"init={init} has its own sizes, so size={size} has no place. Leave one of them out.")
    given = _described(init, c)
    c.model.update(given["model"])
    count = given["num_instances"]
    if count == 1:
        return {"init_from": init}
    if n != (count,):
        raise InputError(
            f"init={init} mixes {count} instances, so nothing else can start from it. Give n={count}, or a plain network."
        )
    return {"init_from": init} | {key: given[key] for key in ("num_instances", "mux", "demux")}


def _described(init: str, c) -> dict:
    """The config, as nested dicts, of the run or the published network in a folder.

    Raises:
      InputError: there is none.
    """
    path = packaged.encoder(init) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"init={init} cannot be read: {error}. Name the folder of a run or of a published encoder, with its config.json, or one of "
            f"{', '.join(packaged.PACKAGES)}."
        ) from error
    if "model" in config and "data" in config:
        return config
    from datamux_jax import hf_config  # Heavy import, needed for published encoders alone.

    return hf_config.to_config(config, str(path), c).to_dict()
