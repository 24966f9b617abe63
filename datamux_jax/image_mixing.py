"""The image transformations of DataMUX (appendix on vision): `[B, N, H, W] -> [B, H, W]`, mixed by their sum. Table `IMAGE_MIXING`."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from datamux_jax.errors import InputError
from datamux_jax.layers import Array
from datamux_jax.mixing import Mixing, floating
from datamux_jax.mux import rotation, total, transform

HIDDEN = 16  # Channels between the two convolutions of `nonlinear`.
SUBSAMPLED = 4  # Of `remap`: every so-manieth pixel is kept, and the canvas has so many tiles in a row.


class ImageMixing(Mixing):
    """What all share: `sum_i(phi_i(x_i))`; `N` is read from the inputs."""

    def __call__(self, x_BxNxHxW: Array) -> Array:
        """
        Raises:
          InputError: the inputs are no groups of images in grey.
        """
        if x_BxNxHxW.ndim != 4:
            raise InputError(
                f"The mux {type(self).__name__} takes images [groups, N, height, width], but got shape {list(x_BxNxHxW.shape)}. "
                "Take the axis of channels off (x[..., 0]), or use one of mixing.MIXING, which take any shape."
            )
        return self.mix(floating(x_BxNxHxW))

    def mix(self, x_BxNxHxW: Array) -> Array:
        raise NotImplementedError


def convolve(x: Array, kernel: Array) -> Array:
    """Convolution with padding 1: `[B, H, W, C]` with `[3, 3, C, F]`."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def gaussian_kernels(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return jax.random.normal(key, shape, dtype)


def equal_kernels(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return jnp.ones(shape, dtype)


def graded_kernels(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    return jnp.broadcast_to(jnp.arange(1, shape[0] + 1, dtype=dtype)[:, None, None], shape)


class Gaussian(ImageMixing):
    """Convolution with a fixed random 3x3 kernel, padding 1."""

    kernels = staticmethod(gaussian_kernels)

    @nn.compact
    def mix(self, x_BxNxHxW: Array) -> Array:
        kernels_Nx3x3 = self.instance_embedding(self.kernels, x_BxNxHxW.shape[1], 3, 3)
        # A convolution sums over channels: with instances as channels it transforms and mixes them at once.
        return convolve(jnp.moveaxis(x_BxNxHxW, 1, -1), jnp.moveaxis(kernels_Nx3x3, 0, -1)[..., None])[..., 0]


class Learnable(Gaussian):
    """The same, trained."""

    learned: bool = True
    parameter = "kernel"


class Identity(Gaussian):
    """Convolution with a 3x3 kernel of ones, the same for all: the control, in which instances cannot be told apart."""

    kernels = staticmethod(equal_kernels)


class Graded(Gaussian):
    """Convolution with a 3x3 kernel of `i + 1`."""

    kernels = staticmethod(graded_kernels)


def rotations(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Initialiser: `[N, P, P]` independent Haar-random matrices of SO(P)."""
    return jax.vmap(lambda key: rotation(key, shape[-1], dtype))(jax.random.split(key, shape[0]))


class Orthogonal(ImageMixing):
    """A fixed matrix of SO(H * W) on the flattened image."""

    @nn.compact
    def mix(self, x_BxNxHxW: Array) -> Array:
        b, n, h, w = x_BxNxHxW.shape
        matrices = self.instance_embedding(rotations, n, h * w, h * w).astype(x_BxNxHxW.dtype)
        mixed = total(transform(lambda matrix, x: matrix @ x, matrices, x_BxNxHxW.reshape(b, n, h * w)))
        return mixed.reshape(b, h, w)


class LearnableMatrix(Orthogonal):
    """The same, trained; it starts orthogonal."""

    learned: bool = True
    parameter = "matrix"


class Nonlinear(ImageMixing):
    """`tanh(conv(tanh(conv(x))))`, 3x3 with padding 1, 16 channels between, without biases, trained.

    Kernels start standard normal, as published: with smaller ones images are faint, and single instances are never learned.
    """

    channels = 1

    @nn.compact
    def mix(self, x_BxNxHxW: Array) -> Array:
        n = x_BxNxHxW.shape[1]

        def kernel(name: str, inputs: int, outputs: int) -> Array:
            return self.param(f"{name}_kernel", gaussian_kernels, (n, 3, 3, inputs, outputs))

        kernels = kernel("first", 1, HIDDEN), kernel("second", HIDDEN, self.channels)

        def phi(kernels: tuple[Array, ...], x: Array) -> Array:
            for kernel in kernels:
                x = nn.tanh(convolve(x, kernel))
            return x

        # One convolution an instance: mapped, they become one grouped convolution, whose gradient takes XLA's CPU backend 50 times as
        # long (2 cores, N = 8).
        each = (phi(tuple(one[i] for one in kernels), x_BxNxHxW[:, i, ..., None]) for i in range(n))
        mixed = functools.reduce(jnp.add, each)
        return mixed if self.channels > 1 else mixed[..., 0]


class NonlinearExpand(Nonlinear):
    """The same with 8 channels at the end, so that the mixed image has 8: `[B, H, W, 8]`."""

    channels = 8


def turned(size: tuple[int, int], degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of an image turned counter-clockwise about its centre come from.

    Returns:
      For each pixel the number of the nearest one there, `[H, W]`, and whether it lies within the image.
    """
    height, width = size
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    row, column = np.meshgrid(np.arange(height) - middle[0], np.arange(width) - middle[1], indexing="ij")
    angle = np.deg2rad(degrees)
    from_row = np.rint(np.round(np.cos(angle) * row + np.sin(angle) * column + middle[0], 6)).astype(int)
    from_column = np.rint(np.round(np.cos(angle) * column - np.sin(angle) * row + middle[1], 6)).astype(int)
    within = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    return np.where(within, from_row * width + from_column, 0), within


class Rotation(ImageMixing):
    """Rotation by `360 / N * i` degrees, to the nearest pixel, times `1 - 2i`; nothing is drawn or trained."""

    def mix(self, x_BxNxHxW: Array) -> Array:
        _, n, h, w = x_BxNxHxW.shape
        source, within = (np.stack(each) for each in zip(*(turned((h, w), 360 / n * i) for i in range(n)), strict=True))
        factor = (within * (1 - 2 * np.arange(n))[:, None, None]).astype(x_BxNxHxW.dtype)

        def phi(how: tuple[Array, Array], x_HxW: Array) -> Array:
            source_HxW, factor_HxW = how
            return x_HxW.reshape(-1)[source_HxW] * factor_HxW

        return total(transform(phi, (jnp.asarray(source), jnp.asarray(factor)), x_BxNxHxW))


class Remap(ImageMixing):
    """Every 4th pixel of every 4th row, put into tile `i` of 4x4 tiles, row by row; nothing is drawn or trained."""

    def mix(self, x_BxNxHxW: Array) -> Array:
        b, n, h, w = x_BxNxHxW.shape
        if n > SUBSAMPLED**2 or h % SUBSAMPLED or w % SUBSAMPLED:
            raise InputError(
                f"The mux Remap puts each of N = {n} images of {h}x{w} pixels into one of {SUBSAMPLED**2} tiles: N is "
                f"{SUBSAMPLED**2} at most, and {SUBSAMPLED} divides height and width. Use fewer instances, other sizes or another mux."
            )
        small = x_BxNxHxW[:, :, ::SUBSAMPLED, ::SUBSAMPLED]
        tiles = jnp.pad(small, ((0, 0), (0, SUBSAMPLED**2 - n), (0, 0), (0, 0)))
        tiles = tiles.reshape(b, SUBSAMPLED, SUBSAMPLED, h // SUBSAMPLED, w // SUBSAMPLED)
        return jnp.swapaxes(tiles, 2, 3).reshape(b, h, w)


IMAGE_MIXING: dict[str, type[ImageMixing]] = {
    "gaussian": Gaussian,
    "learnable": Learnable,
    "identity": Identity,
    "graded": Graded,
    "orthogonal": Orthogonal,
    "learnable_matrix": LearnableMatrix,
    "nonlinear": Nonlinear,
    "nonlinear_expand": NonlinearExpand,
    "rotation": Rotation,
    "remap": Remap,
}
