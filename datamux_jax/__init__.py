"""Data multiplexing in JAX and Flax: mix `N` inputs, run the network once, unmix `N` predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamux_jax.errors import InputError
from datamux_jax.grouping import group, ungroup

if TYPE_CHECKING:
    from pathlib import Path

    from datamux_jax.exported import ExportedPredictor
    from datamux_jax.multiplexed import Multiplexed
    from datamux_jax.predict import Predictor

__version__ = "0.1.0"
__all__ = ["InputError", "Multiplexed", "__version__", "group", "load", "load_exported", "ungroup"]


def __getattr__(name: str) -> type[Multiplexed]:
    if name == "Multiplexed":
        from datamux_jax import multiplexed  # Imports jax and all; `import datamux_jax` alone stays quick.

        return multiplexed.Multiplexed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | Path) -> Predictor:
    """Loads a trained run for prediction: `datamux_jax.load("runs/text/n2")(["guten Morgen"])`.

    Args:
      path: the folder of a run.

    Returns:
      A `datamux_jax.predict.Predictor`.

    Raises:
      InputError: no such run, no checkpoint yet, or a run without a trained classifier.
    """
    from datamux_jax import predict  # Imports jax and all, too.

    return predict.load(path)


def load_exported(path: str | Path) -> ExportedPredictor:
    """Loads an exported predictor, without the network's code: `datamux_jax.load_exported("exports/sst2")(["a fine film"])`.

    Args:
      path: what `python -m launch.convert --workdir=RUN --to_stablehlo=DIR` wrote.

    Returns:
      A `datamux_jax.exported.ExportedPredictor`, used like a `Predictor`.

    Raises:
      InputError: no such folder, a damaged one, or one for another kind of device.
    """
    from datamux_jax import exported

    return exported.load_exported(path)
