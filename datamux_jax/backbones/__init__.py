"""Networks that run once on a mixed input. Table `BACKBONES`: name -> module class taking a `layers.Spec`."""

from datamux_jax.backbones.encoder import Encoder

BACKBONES = {"encoder": Encoder}

__all__ = ["BACKBONES", "Encoder"]
