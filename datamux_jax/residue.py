"""How far multiplexed attention is from separate attentions when instances are not kept apart, measured.

The construction of `theory.py` is run, through the real multiplexer and the real attention, for mixers whose instances overlap, and
compared with separate attentions. `attention` and `norms` return rows; `table` prints them. The same key gives the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from datamux_jax import theory
from datamux_jax.errors import InputError
from datamux_jax.layers import Array, Attention, Block, Spec
from datamux_jax.mux import BinaryHadamard, GaussianHadamard, Multiplexer, RandomOrtho, RandomOrthoLowRank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Instances of width 8 with 2 heads; a standard deviation with which attention differs from the mean over positions.
SPEC = Spec(hidden_size=8, num_layers=1, num_heads=2, mlp_dim=32, init_stddev=0.5)

# Gaussian vectors of unit variance, as the library trains with; the error does not depend on their norm.
MIXERS: dict[str, Callable[[Spec, int], Multiplexer]] = {
    "random_ortho_low_rank": RandomOrthoLowRank,
    "binary_hadamard": BinaryHadamard,
    "binary_hadamard, epsilon=0.5": functools.partial(BinaryHadamard, epsilon=0.5),
    "gaussian_hadamard": functools.partial(GaussianHadamard, norm=0.0),
    "random_ortho": RandomOrtho,
}

# Of lines in a picture, one a mixer.
STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (1, 3)), "x"))


@dataclasses.dataclass(frozen=True)
class Residue:
    """Errors of demultiplexed attention against separate attentions, relative (L2 norms over all instances), means over draws.

    Attributes:
      mux: key of `MIXERS`.
      instances: `N`.
      hidden_size: `D` of the mixed row.
      width: `d` of an instance.
      own: reading each instance with the inverse of its own transformation.
      joint: reading all together with the pseudo-inverse, the best linear unmixing.
      condition: of the joint reading, the largest of the draws; errors may grow by this factor.
    """

    mux: str
    instances: int
    hidden_size: int
    width: int
    own: float
    joint: float
    condition: float


@dataclasses.dataclass(frozen=True)
class NormResidue:
    """Relative errors of demultiplexed post-LN blocks against separate ones, low-rank orthogonal mixing, means over draws.

    Attributes:
      instances: `N`.
      hidden_size: `D = N d` of the mixed row.
      full: with LayerNorms over the width of the mixed row, of scale `1 / sqrt(N)`, the size of a state in it.
      per_instance: with LayerNorms over the state of each instance (`theory.InstanceNormBlock`).
      unequal: like `full`, instance 0 being ten times as large as the others; error of the others. NaN for N = 1.
    """

    instances: int
    hidden_size: int
    full: float
    per_instance: float
    unequal: float


def attention(
    key: Array,
    *,
    instances: Sequence[int] = (2, 4, 8),
    sizes: Sequence[int] = (64, 128, 256),
    mixers: Sequence[str] = tuple(MIXERS),
    spec: Spec = SPEC,
    length: int = 8,
    draws: int = 3,
) -> list[Residue]:
    """Measures every mixer at every `N` and `D`; float32.

    Args:
      key: of mixers, weights and states.
      instances: values of `N`.
      sizes: values of `D`; those below `N d` are left out, for they cannot hold the instances.
      mixers: keys of `MIXERS`.
      spec: of one instance; its `hidden_size` is `d`.
      length: positions.
      draws: of everything, over which errors are averaged.

    Raises:
      InputError: an unknown mixer, no `N` or one below 1, no `D` holds any `N`, or `draws` below 1.
    """
    for name in mixers:
        if name not in MIXERS:
            raise InputError(f"There is no mixer {name!r} to measure. Choose among: {'; '.join(MIXERS)}.")
    _check_instances(instances)
    pairs = [(n, size) for n in instances for size in sizes if size >= n * spec.hidden_size]
    if not pairs:
        raise InputError(
            f"No size of {list(sizes)} holds N of {list(instances)} instances of width {spec.hidden_size}: N * d <= D must hold. Use a "
            f"size of at least {min(instances) * spec.hidden_size}."
        )
    rows = []
    for name in mixers:
        for n, size in pairs:
            found = [
                _attention_once(k, MIXERS[name], theory.mixed_spec(spec, n, size), n, spec, length) for k in _keys(key, draws)
            ]
            own, joint, condition = zip(*found, strict=True)
            rows.append(Residue(name, n, size, spec.hidden_size, sum(own) / draws, sum(joint) / draws, max(condition)))
    return rows


def _check_instances(instances: Sequence[int]) -> None:
    if not instances or min(instances) < 1:
        raise InputError(f"instances = {list(instances)} has nothing to measure. Give numbers of instances, each at least 1.")


def norms(
    key: Array, *, instances: Sequence[int] = (1, 2, 4, 8), spec: Spec = SPEC, length: int = 8, draws: int = 3
) -> list[NormResidue]:
    """Measures what a LayerNorm over the mixed row costs, and that one of each instance's state costs nothing; float32.

    Args: as `attention`; the mixed row is `D = N d` wide.

    Raises:
      InputError: no `N` or one below 1, or `draws` below 1.
    """
    _check_instances(instances)
    rows = []
    for n in instances:
        found = [_norms_once(k, theory.mixed_spec(spec, n), n, spec, length) for k in _keys(key, draws)]
        full, per_instance, unequal = (sum(values) / draws for values in zip(*found, strict=True))
        rows.append(NormResidue(n, n * spec.hidden_size, full, per_instance, unequal))
    return rows


def table(rows: Sequence[Any]) -> str:
    """Rows of `attention` or `norms` as a Markdown table."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.2g}"
        return str(value)

    names = [field.name for field in dataclasses.fields(rows[0])]
    lines = [names, ["---"] * len(names), *([cell(getattr(row, name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Residue]) -> Figure:
    """The errors of `attention` over `D`: each instance read by itself, and all together. Colours are N, line styles mixers."""
    from matplotlib import pyplot as plt  # Heavy import, needed here alone.

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    instances, mixers = (sorted({getattr(row, name) for row in rows}) for name in ("instances", "mux"))
    for axes, reading in zip(panels, ("own", "joint"), strict=True):
        for (colour, n), (style, mux) in itertools.product(enumerate(instances), enumerate(mixers)):
            mine = [row for row in rows if (row.mux, row.instances) == (mux, n)]
            sizes, errors = [row.hidden_size for row in mine], [getattr(row, reading) for row in mine]
            axes.plot(sizes, errors, color=f"C{colour}", linestyle=STYLES[style][0], marker=STYLES[style][1], markersize=5)
        sizes = sorted({row.hidden_size for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("D, width of the mixed row")
        axes.set_ylabel("relative error")
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].set_title("each instance read by its own inverse")
    panels[1].set_title("all read together (pseudo-inverse)")
    lines = [plt.Line2D([], [], color=f"C{colour}", label=f"N = {n}") for colour, n in enumerate(instances)]
    lines += [
        plt.Line2D([], [], color="black", linestyle=ls, marker=m, label=mux)
        for (ls, m), mux in zip(STYLES, mixers, strict=False)
    ]
    figure.legend(handles=lines, loc="outside right center", fontsize=8)
    return figure


def relative_error(found: Any, expected: Any) -> float:
    """`|found - expected| / |expected|`, L2."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _keys(key: Array, draws: int) -> list[Array]:
    if draws < 1:
        raise InputError(f"draws = {draws} leaves nothing to average over. Ask for at least 1.")
    # Draw by draw the same for every mixer, N and D: differences in a table are theirs.
    return [jax.random.fold_in(key, draw) for draw in range(draws)]


@functools.partial(jax.jit, static_argnums=0)
def _separate(layer: nn.Module, params: Any, z_BxNxLxd: Array) -> Array:
    """`layer` on every instance by itself."""
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda z_BxLxd: cast(Array, layer.apply({"params": params}, z_BxLxd)), in_axes=1, out_axes=1)(z_BxNxLxd)


@functools.partial(jax.jit, static_argnums=0)
def _made(mux: Multiplexer, key: Array) -> Any:
    """Parameters of a multiplexer."""
    return nn.unbox(mux.init(key, jnp.zeros((1, mux.num_instances, 1, mux.spec.width), mux.spec.dtype))["params"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mixed(mux: Multiplexer, layer: nn.Module, mixing: Any, params: Any, places: theory.Subspaces, z_BxNxLxd: Array) -> Array:
    """The states enter, are mixed, go through `layer` once and are read: `[B, N, L, d]`."""
    with jax.default_matmul_precision("highest"):
        m_BxLxD = mux.apply({"params": mixing}, places.enter(z_BxNxLxd))
        return places.demultiplex(cast(Array, layer.apply({"params": params}, m_BxLxD)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weights(layer: nn.Module, spec: Spec, key: Array) -> Any:
    """Parameters of `layer`, with biases that are not zero."""
    for_init, for_bias = jax.random.split(key)
    params = nn.unbox(layer.init(for_init, jnp.zeros((1, 1, spec.hidden_size), spec.dtype))["params"])

    def noisy(path: Any, leaf: Array) -> Array:
        return leaf + 0.1 * jax.random.normal(for_bias, leaf.shape) if path[-1].key == "bias" else leaf

    return jax.tree_util.tree_map_with_path(noisy, params)


def _drawn(key: Array, layer: nn.Module, spec: Spec, n: int, length: int) -> tuple[Any, Array]:
    """Parameters of `layer` and states `[2, N, L, d]`."""
    for_weights, for_states = jax.random.split(key)
    return _weights(layer, spec, for_weights), jax.random.normal(for_states, (2, n, length, spec.hidden_size), spec.dtype)


def _attention_once(
    key: Array, make: Callable[[Spec, int], Multiplexer], mixed: Spec, n: int, spec: Spec, length: int
) -> tuple[float, float, float]:
    for_mux, for_layer, for_places = jax.random.split(key, 3)
    single, z_BxNxLxd = _drawn(for_layer, Attention(spec), spec, n, length)
    expected = _separate(Attention(spec), single, z_BxNxLxd)
    mux = make(mixed, n)
    mixing = _made(mux, for_mux)
    own = theory.subspaces(theory.mixing_matrices(mux, mixing), spec.hidden_size, for_places)

    def error(places: theory.Subspaces) -> float:
        weights = theory.attention_weights(single, places, mixed)
        return relative_error(_mixed(mux, Attention(mixed), mixing, weights, places, z_BxNxLxd), expected)

    return error(own), error(own.jointly()), own.condition


def _norms_once(key: Array, mixed: Spec, n: int, spec: Spec, length: int) -> tuple[float, float, float]:
    for_mux, for_layer, for_places = jax.random.split(key, 3)
    single, z_BxNxLxd = _drawn(for_layer, Block(spec), spec, n, length)
    mux = RandomOrthoLowRank(mixed, n)
    mixing = _made(mux, for_mux)
    places = theory.subspaces(theory.mixing_matrices(mux, mixing), spec.hidden_size, for_places)

    def norms_of(width: int, scale: float) -> dict[str, Any]:
        # A norm over the mixed row has no scale and bias of single instances, so the separate blocks go without, too.
        norm = {"scale": jnp.full(width, scale), "bias": jnp.zeros(width)}
        return {"attention_norm": norm, "mlp_norm": norm}

    single = {**single, **norms_of(spec.hidden_size, 1.0)}
    # States of variance 1 are 1 / sqrt(N) as large in the row: with that scale only the mixing of statistics is left to measure.
    full = {**theory.block_weights(single, places, mixed), **norms_of(mixed.hidden_size, 1 / math.sqrt(n))}

    def errors(layer: nn.Module, weights: Mapping[str, Any], states: Array) -> tuple[Array, Array]:
        return _mixed(mux, layer, mixing, weights, places, states), _separate(Block(spec), single, states)

    block = theory.InstanceNormBlock(mixed, n, spec.hidden_size)
    apart = errors(block, theory.normed_block_weights(single, places, mixed), z_BxNxLxd)
    loud = errors(Block(mixed), full, z_BxNxLxd.at[:, 0].multiply(10.0))
    unequal = relative_error(*(x[:, 1:] for x in loud)) if n > 1 else math.nan
    return relative_error(*errors(Block(mixed), full, z_BxNxLxd)), relative_error(*apart), unequal
