"""Images through the one trainer: an MLP or a LeNet in `Multiplexed`, as a network that classifies."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from datamux_jax.backbones.vision import MLP, VISION, LeNet, dense
from datamux_jax.errors import InputError, choose
from datamux_jax.image_mixing import IMAGE_MIXING
from datamux_jax.layers import Array
from datamux_jax.mixing import MIXING
from datamux_jax.model import Network
from datamux_jax.multiplexed import Multiplexed
from datamux_jax.unmixing import UNMIXING

MIXERS: dict[str, type[nn.Module]] = {**MIXING, **IMAGE_MIXING}


class Classes(nn.Module):
    """Class logits of states `[..., D]`. The published network ends in tanh; here `losses.squared_loss` applies it."""

    num_classes: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        return dense(z, self.num_classes, "dense")(z).astype(jnp.float32)


class ImageClassifier(Network):
    """`Multiplexed` with the methods that training, evaluation and prediction call.

    Attributes:
      network: takes images `[B, N, H, W]`, gives logits `[B, N, C]`.
      dtype: of the computation.
    """

    network: Multiplexed
    dtype: str = "float32"

    def __call__(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> dict[str, Array]:
        """Touches every parameter: `init` uses it."""
        return {"logits": self.classify(self.encode(inputs, mask_BxNxL, train), mask_BxNxL, train)}

    def encode(self, inputs: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """States of the mixed images: `[B, D]`. Images have no padding, and these networks no dropout."""
        del mask_BxNxL, train
        return self.network.encode(inputs.astype(self.dtype))

    def features(self, h: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        """What the head reads of every instance: `[B, N, D]`."""
        del mask_BxNxL, train
        return self.network.separate(h)

    def classify(self, h: Array, mask_BxNxL: Array, train: bool = False) -> Array:
        del mask_BxNxL, train
        return self.network.unmix(h)


def build_classifier(config: Any, *, num_classes: int) -> ImageClassifier:
    """The network that `config` describes, for a config whose `model.backbone` is one of `VISION`.

    Raises:
      InputError: an unknown name.
    """
    plain = config.mux.name == "none"
    return ImageClassifier(
        Multiplexed(
            mux=None if plain else _mixer(config),
            backbone=_backbone(config, plain),
            demux=None if plain else _unmixer(config),
            num_instances=config.num_instances,
            head=Classes(num_classes),
        ),
        config.dtype,
    )


def _mixer(config: Any) -> nn.Module:
    name = choose(MIXERS, config.mux.name, "The multiplexer of images mux.name =")
    # Some are learned whatever the config says; none is frozen that was asked to learn.
    options: dict[str, Any] = {"learned": True} if config.mux.learned else {}
    if name == "gaussian_hadamard":
        options["norm"] = config.mux.norm
    if name == "binary_hadamard":
        options["epsilon"] = config.mux.epsilon
    return MIXERS[name](**options)


def _backbone(config: Any, plain: bool) -> nn.Module:
    if choose(VISION, config.model.backbone, "The backbone model.backbone =") == "mlp":
        return MLP(config.model.hidden_size, config.model.num_layers)
    return LeNet(6) if plain else LeNet()


def _unmixer(config: Any) -> nn.Module:
    name = choose(UNMIXING, config.demux.name, "The demultiplexer of images demux.name =")
    if name == "rsa":
        return UNMIXING[name](config.num_instances, num_layers=config.demux.num_layers, form=config.demux.form)
    return UNMIXING[name](config.num_instances)


def check(config: Any) -> None:
    """Checks the keys of a config whose `model.backbone` is one of `VISION`; the rest is checked with all others.

    Raises:
      InputError: a name that images do not have, or a key that only Transformers, or another multiplexer or demultiplexer, read.
    """
    if config.objective != "classification" or config.retrieval_loss_coeff:
        raise InputError(
            f"model.backbone = {config.model.backbone!r} classifies images, but objective = {config.objective!r} with "
            f"retrieval_loss_coeff = {config.retrieval_loss_coeff}. Use objective = 'classification' without retrieval."
        )
    if config.mux.name != "none":
        choose(MIXERS, config.mux.name, f"For model.backbone = {config.model.backbone!r} the multiplexer mux.name =")
        choose(UNMIXING, config.demux.name, f"For model.backbone = {config.model.backbone!r} the demultiplexer demux.name =")
    for key, value, unset in (
        ("remat", config.remat, "none"),
        ("scan_layers", config.scan_layers, False),
        ("attention", config.attention, "xla"),
        ("model.dropout_rate", config.model.dropout_rate, 0),
        ("model.attention_dropout_rate", config.model.attention_dropout_rate, 0),
        ("model.pool", config.model.pool, "mean"),
        ("model.family", config.model.family, "bert"),
        ("model.num_heads", config.model.num_heads, 4),
        ("model.mlp_dim", config.model.mlp_dim, 512),
        ("model.embedding_size", config.model.embedding_size, 0),
        ("model.init_stddev", config.model.init_stddev, 0),
        ("model.layer_norm_eps", config.model.layer_norm_eps, 1e-6),
        ("mux.attend_padding", config.mux.attend_padding, False),
        ("demux.prefix", config.demux.prefix, "extend"),
        *(
            (("model.hidden_size", config.model.hidden_size, 128), ("model.num_layers", config.model.num_layers, 3))
            if config.model.backbone == "lenet"
            else ()
        ),
    ):
        if value != unset:
            raise InputError(
                f"{key} = {value!r} is for Transformers, and model.backbone = {config.model.backbone!r} does not read it. "
                f"Leave it {unset!r}."
            )
    if config.mux.learned and config.mux.name in ("rotation", "remap"):
        raise InputError(
            f"mux.learned = True asks mux.name = {config.mux.name!r} to learn, which has no parameters. Leave it False, or choose "
            "another multiplexer."
        )
    for key, value, unset, part, chosen, reader in (
        ("mux.norm", config.mux.norm, 0, "mux", config.mux.name, "gaussian_hadamard"),
        ("mux.epsilon", config.mux.epsilon, 0, "mux", config.mux.name, "binary_hadamard"),
        ("demux.num_layers", config.demux.num_layers, 2, "demux", config.demux.name, "rsa"),
        ("demux.form", config.demux.form, "paper", "demux", config.demux.name, "rsa"),
    ):
        if value != unset and chosen not in (reader, "none"):  # Flags hold for the plain network of an experiment too.
            raise InputError(
                f"{key} = {value!r} is a setting of {part}.name = {reader!r}, and {part}.name = {chosen!r} does not read it. "
                f"Leave it {unset!r}, or choose {reader!r}."
            )
