"""Multiplexing around any Flax module: mix `N` inputs, run the module once, unmix `N` outputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn

from datamux_jax.errors import InputError, brief
from datamux_jax.layers import Array

# What a module raises, as a rule, that is fed a shape which it does not take.
WRONG_SHAPE = (TypeError, ValueError, IndexError, AssertionError, flax.errors.ScopeParamShapeError)
# Arguments by which modules are told that they are trained.
FLAGS = ("train", "training", "deterministic")


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

    Further arguments of a call go to the backbone, `model.apply(variables, x, train=True)`; `train`, `training` and `deterministic`,
    given by keyword, to every part that has an argument of that name. Random streams and mutable collections (batch statistics) are
    used as without multiplexing: `rngs=` and `mutable=` of `apply`.

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

    def __post_init__(self) -> None:
        for role in ("mux", "backbone", "demux", "head"):
            if isinstance(part := getattr(self, role), type):
                raise InputError(f"{role} = {part.__name__} is a class. Give a module of it: {role} = {part.__name__}(...).")
        super().__post_init__()

    def __call__(self, x_BxN: Array, *args: Any, **kwargs: Any) -> Array:
        """
        Args:
          x_BxN: inputs, `[B, N, *in]`.
          *args: passed to the backbone.
          **kwargs: passed to the backbone, those of `FLAGS` to all parts that take them.

        Returns:
          `[B, N, *out]`.

        Raises:
          InputError: a shape that a part does not take, or that it should not give; says which part. What a part raises for another
            reason, or as an error of its own, passes with a note that says the same.
        """
        return self.unmix(self.encode(x_BxN, *args, **kwargs), **_flags(kwargs))

    def encode(self, x_BxN: Array, *args: Any, **kwargs: Any) -> Array:
        """The backbone's output for mixed inputs, `[B, *out]`; arguments and errors as `__call__`."""
        mixed = self.mix(x_BxN, **_flags(kwargs))
        # A flag that only others have is none of the backbone's; what nobody has is refused by it.
        elsewhere = {name for name in _flags(kwargs) for part in (self.mux, self.demux, self.head) if name in _arguments(part)}
        own = {name: value for name, value in kwargs.items() if name not in elsewhere - _arguments(self.backbone)}
        made = "" if self.mux is None else f", which the mux {_name(self.mux)} made of inputs {_instances(x_BxN)}"
        h = self._fitting(
            "backbone",
            lambda x: self.backbone(x, *args, **own),
            mixed,
            f"input of shape {list(mixed.shape)}{made}",
            "choose a mux that gives what the backbone takes (those of mixing.py keep the shape of an input), or another backbone",
        )
        if getattr(h, "shape", ())[:1] != mixed.shape[:1]:
            raise InputError(
                f"The backbone {_name(self.backbone)} must keep the axis of groups: it got {list(mixed.shape)}, so it must give one "
                f"array [{mixed.shape[0]}, ...], but it gave {_shape(h)}. Wrap it in a module whose output has this form."
            )
        return h

    def mix(self, x_BxN: Array, **flags: Any) -> Array:
        """Mixed inputs, `[B, *mixed]`; arguments and errors as `__call__`."""
        n = self.num_instances
        if n < 1 or ((self.mux is None or self.demux is None) and n != 1):
            raise InputError(
                f"num_instances = {n} with mux = {_name(self.mux)} and demux = {_name(self.demux)}: N is at least 1, and more than one "
                "instance needs both a mux and a demux. Give them, or set num_instances = 1."
            )
        if len(_shape_of(x_BxN)) < 2 or x_BxN.shape[1] != n:
            raise InputError(
                f"The inputs have {_shape(x_BxN)}, but this network mixes {n} instances, so it takes [groups, {n}, ...]. "
                f"Make groups of a flat batch with datamux_jax.group(x, {n})."
            )
        if self.mux is None:
            return x_BxN[:, 0]
        mux = _with_flags(self.mux, flags)
        mixed = self._fitting("mux", mux, x_BxN, f"inputs of shape {list(x_BxN.shape)}")
        if _shape_of(mixed)[:1] != x_BxN.shape[:1]:
            raise InputError(
                f"The mux {_name(self.mux)} must make one mixed input of each group: of inputs {list(x_BxN.shape)} one array "
                f"[{x_BxN.shape[0]}, ...], but it gave {_shape(mixed)}. Correct it, or use one of mixing.MIXING."
            )
        return mixed

    def separate(self, h_B: Array, **flags: Any) -> Array:
        """The states of all instances before the head, `[B, N, *unmixed]`, of one output of the backbone; errors as `__call__`."""
        if self.demux is None:
            return h_B[:, None]
        expected = (h_B.shape[0], self.num_instances)
        demux = _with_flags(self.demux, flags)
        z_BxN = self._fitting("demux", demux, h_B, f"the backbone's output, of shape {list(h_B.shape)}")
        if _shape_of(z_BxN)[:2] != expected:
            raise InputError(
                f"The demux {_name(self.demux)} must give the states of all instances: of the backbone's output {list(h_B.shape)} "
                f"one array [{expected[0]}, {expected[1]}, ...], but it gave {_shape(z_BxN)}. Its own num_instances must be "
                f"{expected[1]} too."
            )
        return z_BxN

    def unmix(self, h_B: Array, **flags: Any) -> Array:
        """The outputs of all instances, `[B, N, *out]`, of one output of the backbone, `[B, *out]`; errors as `__call__`."""
        z_BxN = self.separate(h_B, **flags)
        if self.head is None:
            return z_BxN
        over_instances: Any = nn.vmap(
            lambda head, z_B: _with_flags(head, flags)(z_B),
            variable_axes={"params": None},
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        fed = f"states of all instances, of shape {list(z_BxN.shape)}, mapped over instances"
        return self._fitting("head", lambda z: over_instances(self.head, z), z_BxN, fed)

    def _fitting(self, role: str, call: Callable[[Array], Any], x: Array, fed: str, way_out: str = "") -> Any:
        """`call(x)`, that of a part; what it raises says which part it was, and what it was fed."""
        part = f"The {role} {_name(getattr(self, role))}"
        try:
            return call(x)
        except InputError:
            raise
        except Exception as error:
            if not _may_be_shapes(error):
                error.add_note(f"{part} was fed {fed}.")
                raise
            raise InputError(
                f"{part} failed on {fed}: {type(error).__name__}: {brief(error)} If it takes other shapes, "
                f"{way_out or f'choose a {role} that fits, or change what it is fed'}."
            ) from error


def _flags(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in FLAGS}


def _arguments(module: nn.Module | None) -> set[str]:
    """The names of what a call of the module takes; one that passes anything on (`nn.Sequential`) has none of its own."""
    return set() if module is None else set(inspect.signature(type(module).__call__).parameters)


def _with_flags(module: Any, flags: Mapping[str, Any]) -> Callable[[Array], Any]:
    """`module`, called with those of the flags that it has."""
    own = {name: value for name, value in flags.items() if name in _arguments(module)}
    return lambda x: module(x, **own)


def _may_be_shapes(error: Exception) -> bool:
    """Whether an error may come of what a module was fed: one of the language's or flax's own, but not for a misspelt argument.

    Errors of classes derived from these say more by their names (those of traced flags, of a user's own), and keep them.
    """
    calls_wrongly = isinstance(error, TypeError) and re.search(r"\b(keyword|positional) (only )?arguments?\b", str(error))
    return type(error) in WRONG_SHAPE and not calls_wrongly


def _name(module: nn.Module | None) -> str:
    return "None" if module is None else type(module).__name__


def _instances(x_BxN: Array) -> str:
    return f"[groups, {x_BxN.shape[1]}, ...] with instances of shape {list(x_BxN.shape[2:])}"


def _shape_of(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
