"""MLP and LeNet as DataMUX has them for images, and the layers that they are made of. Table `VISION`.

Kernels and biases start as torch's do, uniform in `+-1 / sqrt(fan_in)`, with which the published networks were trained. Layers compute
in the type of their input. Parameters have no logical axes: LeNet has a few hundred kilobytes, an MLP a few megabytes, and they lie
whole on every device.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from datamux_jax.errors import InputError
from datamux_jax.layers import Array


def uniform(fan_in: int) -> nn.initializers.Initializer:
    """Initialiser: uniform in `+-1 / sqrt(fan_in)`."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    return init


def dense(x: Array, features: int, name: str | None = None) -> nn.Dense:
    """A dense layer for `x`."""
    init = uniform(x.shape[-1])
    return nn.Dense(features, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)


def convolution(x: Array, features: int, size: int, name: str | None = None) -> nn.Conv:
    """A valid convolution for `x`, `[..., height, width, channels]`, with `size x size` kernels."""
    init = uniform(size * size * x.shape[-1])
    return nn.Conv(features, (size, size), padding="VALID", dtype=x.dtype, kernel_init=init, bias_init=init, name=name)


def halved(x_BxHxWxC: Array) -> Array:
    """Maximum of each 2x2 square; an odd row or column at the end is left out.

    Written with `reshape`: XLA's CPU backend spends more time on the gradient of a pooling window than on the convolutions.
    """
    b, h, w, c = x_BxHxWxC.shape
    squares = x_BxHxWxC[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return squares.max((2, 4))


class LeNet(nn.Module):
    """The shared trunk of DataMUX's LeNet: images `[B, H, W]` or `[B, H, W, C]`, at least 20x20, to states `[B, 84]`.

    Convolution to 10 channels 3x3, to 16 channels 4x4, to 120 channels 3x3, all valid, with tanh after each and maxima of 2x2 squares
    after the first two; then dense to 84, tanh. Of 20x20 pixels the last convolution makes one position.

    Attributes:
      first: channels of the first convolution; the network for single images has 6.
    """

    first: int = 10
    smallest = 20

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x if x.ndim == 4 else x[..., None]
        if min(x.shape[1:3]) < self.smallest:
            raise InputError(
                f"LeNet takes images of at least {self.smallest}x{self.smallest} pixels, but got {x.shape[1]}x{x.shape[2]}. Set "
                f"data.image_size = {self.smallest}, to which smaller images are enlarged."
            )
        x = halved(nn.tanh(convolution(x, self.first, 3, "conv_1")(x)))
        x = halved(nn.tanh(convolution(x, 16, 4, "conv_2")(x)))
        x = nn.tanh(convolution(x, 120, 3, "conv_3")(x)).reshape(x.shape[0], -1)
        return nn.tanh(dense(x, 84, "dense")(x))


class MLP(nn.Module):
    """Dense tanh layers on the flattened image: `[B, ...] -> [B, width]`.

    Attributes:
      width: of every layer.
      depth: number of layers.
    """

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for layer in range(1, self.depth + 1):
            x = nn.tanh(dense(x, self.width, f"dense_{layer}")(x))
        return x


VISION: dict[str, type[nn.Module]] = {"lenet": LeNet, "mlp": MLP}
