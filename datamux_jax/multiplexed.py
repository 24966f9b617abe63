"""Multiplexing around any Flax module: mix `N` inputs, run the module once, unmix `N` outputs."""

from __future__ import annotations

import re
from typing import Any

import flax
import flax.linen as nn
import jax

from datamux_jax.errors import InputError, brief
from datamux_jax.layers import Array

# What a module raises that is fed a shape which it does not take.
WRONG_SHAPE = (TypeError, ValueError, flax.errors.ScopeParamShapeError)


class Multiplexed(nn.Module):
    """`N` inputs through one pass of a module: `[B, N, *in] -> [B, N, *out]`, for inputs and outputs of any rank.

    `B` is the number of groups, `N` that of the instances which share a pass:

        x [B,N,*in] -> mux [B,*mixed] -> backbone [B,*out] -> demux [B,N,*unmixed] -> head, of each instance

    A network of your own, which maps `[B, features]` or `[B, height, width, channels]` or whatever else to one array, with four inputs
    in each pass:

        import datamux_jax, flax.linen as nn, jax
        from datamux_jax import mixing, unmixing

        mux = mixing.GaussianHadamard()
        demux = unmixing.InstanceMLP(num_instances=4)
        model = datamux_jax.Multiplexed(mux, nn.Dense(64), demux, num_instances=4, head=nn.Dense(10))

        images = jax.random.uniform(jax.random.key(0), (30, 8, 8))  # A flat batch; 30 is no multiple of 4.
        x = datamux_jax.group(images.reshape(30, 64), 4)            # [8, 4, 64], the last group filled up with copies.
        variables = model.init(jax.random.key(1), x)
        logits = datamux_jax.ungroup(model.apply(variables, x), 30)  # [30, 10], in the order of the images.

    Further arguments of a call go to the backbone, `model.apply(variables, x, train=True)`. Its random streams and its mutable
    collections (batch statistics) are used as without multiplexing: `rngs=` and `mutable=` of `apply`.

    Attributes:
      mux: module `[B, N, *in] -> [B, *mixed]`, of `mixing.MIXING`, of `image_mixing.IMAGE_MIXING` or any other; None, with `N` = 1:
        nothing is mixed.
      backbone: module `[B, *mixed] -> [B, *out]`, which gives one array.
      demux: module `[B, *out] -> [B, N, *unmixed]`, of `unmixing.UNMIXING` or any other; None, with `N` = 1: nothing is unmixed.
      num_instances: `N`.
      head: module on `[B, *unmixed]` of one instance, mapped over instances, which share its parameters; None: there is none. It draws
        dropout of its own for each instance, and may have no collections but parameters.
    """

    mux: nn.Module | None
    backbone: nn.Module
    demux: nn.Module | None
    num_instances: int
    head: nn.Module | None = None

    def __call__(self, x_BxN: Array, *args: Any, **kwargs: Any) -> Array:
        """
        Args:
          x_BxN: inputs, `[B, N, *in]`.
          *args: passed to the backbone.
          **kwargs: passed to the backbone.

        Returns:
          `[B, N, *out]`.

        Raises:
          InputError: a shape that a part does not take, or that it should not give; says which part.
        """
        return self.unmix(self.encode(x_BxN, *args, **kwargs))

    def encode(self, x_BxN: Array, *args: Any, **kwargs: Any) -> Array:
        """The backbone's output for mixed inputs, `[B, *out]`; arguments and errors as `__call__`."""
        mixed = self.mix(x_BxN)
        made = (
            "The input" if self.mux is None else f"The mux {_name(self.mux)} made of inputs {_instances(x_BxN)} a mixed input"
        )
        try:
            h = self.backbone(mixed, *args, **kwargs)
        except InputError:
            raise
        except WRONG_SHAPE as error:
            if not _about_shapes(error):
                raise
            raise InputError(
                f"{made} of shape {list(mixed.shape)}, which the backbone {_name(self.backbone)} does not take: {brief(error)} Choose "
                "a mux that gives what the backbone takes (those of mixing.py keep the shape of an input), or another backbone."
            ) from error
        if getattr(h, "shape", ())[:1] != mixed.shape[:1]:
            raise InputError(
                f"The backbone {_name(self.backbone)} must keep the axis of groups: it got {list(mixed.shape)}, so it must give one "
                f"array [{mixed.shape[0]}, ...], but it gave {_shape(h)}. Wrap it in a module whose output has this form."
            )
        return h

    def mix(self, x_BxN: Array) -> Array:
        """Mixed inputs, `[B, *mixed]`; arguments and errors as `__call__`."""
        n = self.num_instances
        if n < 1 or ((self.mux is None or self.demux is None) and n != 1):
            raise InputError(
                f"num_instances = {n} with mux = {_name(self.mux)} and demux = {_name(self.demux)}: N is at least 1, and more than one "
                "instance needs both a mux and a demux. Give them, or set num_instances = 1."
            )
        if len(x_BxN.shape) < 2 or x_BxN.shape[1] != n:
            raise InputError(
                f"The inputs have shape {list(x_BxN.shape)}, but this network mixes {n} instances, so it takes [groups, {n}, ...]. "
                f"Make groups of a flat batch with datamux_jax.group(x, {n})."
            )
        if self.mux is None:
            return x_BxN[:, 0]
        mixed = self._fitting("mux", self.mux, x_BxN)
        if _shape_of(mixed)[:1] != x_BxN.shape[:1]:
            raise InputError(
                f"The mux {_name(self.mux)} must make one mixed input of each group: of inputs {list(x_BxN.shape)} one array "
                f"[{x_BxN.shape[0]}, ...], but it gave {_shape(mixed)}. Correct it, or use one of mixing.MIXING."
            )
        return mixed

    def separate(self, h_B: Array) -> Array:
        """The states of all instances before the head, `[B, N, *unmixed]`, of one output of the backbone; errors as `__call__`."""
        if self.demux is None:
            return h_B[:, None]
        expected = (h_B.shape[0], self.num_instances)
        z_BxN = self._fitting("demux", self.demux, h_B)
        if _shape_of(z_BxN)[:2] != expected:
            raise InputError(
                f"The demux {_name(self.demux)} must give the states of all instances: of the backbone's output {list(h_B.shape)} "
                f"one array [{expected[0]}, {expected[1]}, ...], but it gave {_shape(z_BxN)}. Its own num_instances must be "
                f"{expected[1]} too."
            )
        return z_BxN

    def unmix(self, h_B: Array) -> Array:
        """The outputs of all instances, `[B, N, *out]`, of one output of the backbone, `[B, *out]`; errors as `__call__`."""
        z_BxN = self.separate(h_B)
        if self.head is None:
            return z_BxN
        over_instances: Any = nn.vmap(
            lambda head, z_B: head(z_B),
            variable_axes={"params": None},
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        return self._fitting("head", lambda z: over_instances(self.head, z), z_BxN)

    def _fitting(self, role: str, module: Any, x: Array) -> Any:
        """`module(x)`; raises InputError, with what it was fed, if it does not take it."""
        try:
            return module(x)
        except InputError:
            raise
        except WRONG_SHAPE as error:
            if not _about_shapes(error):
                raise
            fed = {"mux": "inputs", "demux": "the backbone's output, of", "head": "unmixed states of all instances, of"}[role]
            part = getattr(self, role)
            raise InputError(
                f"The {role} {_name(part)} does not take {fed} shape {list(x.shape)}: {brief(error)} Choose a {role} that fits, or "
                "change what it is fed."
            ) from error


def _about_shapes(error: Exception) -> bool:
    """Whether an error can come of what a module was fed; not that of a traced flag, or of a misspelt argument."""
    calls_wrongly = isinstance(error, TypeError) and re.search(r"\b(keyword|positional) (only )?arguments?\b", str(error))
    if isinstance(error, jax.errors.JAXTypeError) or calls_wrongly:
        return False
    words = ("shape", "dimension", "axis", "axes", "rank", "size", "broadcast", "unpack", "contract")
    return isinstance(error, flax.errors.ScopeParamShapeError) or any(word in str(error).lower() for word in words)


def _name(module: nn.Module | None) -> str:
    return "None" if module is None else type(module).__name__


def _instances(x_BxN: Array) -> str:
    return f"[groups, {x_BxN.shape[1]}, ...] with instances of shape {list(x_BxN.shape[2:])}"


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
