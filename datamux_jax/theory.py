"""Exact multiplexing: weights with which one layer on a mixed row computes `N` separate layers (DataMUX, the theoretical construction).

An instance is a state `z_i` of width `d`; it enters the multiplexer as `x_i = E_i z_i` and is found in the mixed row `m` as follows:

    m = sum_i C_i z_i,    z_i = R_i m,    with R_i C_i = I and R_i C_j = 0 for j != i.

`C_i` (`write`) is the multiplexer's own map of instance `i`, its scale (`1 / sqrt(N)` or `1 / N`) included, after `E_i` (`enter`);
`R_i` (`read`) is its left inverse. The second condition is what the low-rank orthogonal multiplexer is made for: the images of its
maps `W_i = U H_i^T` are orthogonal, so a reader of one sees nothing of another. A mixed row of width `D` holds `N d <= D` numbers.

Every map of a layer then reads through `R_i` and writes through `C_i`: instance `i` has heads of its own, whose queries, keys and
values are those of `R_i m` and whose outputs go to `C_i`. Biases are those of one instance, the output's written through every `C_i`.

What stays exact: attention (the softmax is taken within a head, and a head belongs to one instance); residual connections, since
`m + sum_i C_i f(z_i) = sum_i C_i (z_i + f(z_i))`; an MLP with any elementwise nonlinearity, since each hidden unit belongs to one
instance; hence whole blocks of these and stacks of them (`PlainBlock`). A LayerNorm over each instance's own state is exact too
(`InstanceNormBlock`), if the images are orthogonal.

What breaks it:
  - LayerNorm over the width of the mixed row. It subtracts the mean over all `D` numbers, which is one direction that crosses every
    subspace, and divides by their common standard deviation, so a loud instance makes the others quiet. `residue.norms` measures it.
  - An elementwise nonlinearity on the mixed row itself: `U` turns the subspaces away from the coordinates.
  - Masks of single instances. Position `j` of the row is position `j` of all instances, so they share one mask `[B, L]`: exact if
    the instances are padded alike, otherwise padding of one is content of another, as everywhere in multiplexed networks.
  - Dropout: one draw on the mixed row hits all instances at once. The construction is about inference.
  - Rounding: matrix products must keep float32 (`jax.default_matmul_precision("highest")` on GPU and TPU).

It is a proof that nothing has to be lost, not a way to save time: `N` instances of width `d` need a row `N` times as wide, and a
product of that width costs `N^2 d^2` where the separate ones cost `N d^2`.

Weights are built on the host in float64 and returned in the dtype of the given ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from datamux_jax.errors import InputError
from datamux_jax.layers import Array, Block, Spec, parameter
from datamux_jax.mux import BinaryHadamard, GaussianHadamard, Multiplexer, RandomOrtho

LINEAR = (GaussianHadamard, BinaryHadamard, RandomOrtho)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspaces:
    """Where instances of width `d` live in mixed rows of width `D`; all arrays are float64.

    Attributes:
      enter_NxDxd: `E_i`, orthonormal columns; the multiplexer is given `x_i = E_i z_i`.
      write_NxDxd: `C_i`, state to mixed row.
      read_NxdxD: `R_i`, mixed row to state.
    """

    enter_NxDxd: np.ndarray
    write_NxDxd: np.ndarray
    read_NxdxD: np.ndarray

    @property
    def condition(self) -> float:
        """The condition number of `[C_1 ... C_N]`: how much reading all instances together may amplify an error. 1 is best."""
        return float(np.linalg.cond(np.concatenate(self.write_NxDxd, axis=1)))

    def jointly(self) -> Subspaces:
        """The same instances, read by the pseudo-inverse of all `C_i` together: the best linear unmixing.

        Where images are orthogonal it is what each `C_i` alone gives.
        """
        read = np.linalg.pinv(np.concatenate(self.write_NxDxd, axis=1))
        return dataclasses.replace(self, read_NxdxD=read.reshape(self.read_NxdxD.shape))

    def enter(self, z_BxNxLxd: Array) -> Array:
        """States to what the multiplexer is given: `[B, N, L, D]`."""
        return jnp.einsum("bnld,ned->bnle", z_BxNxLxd, jnp.asarray(self.enter_NxDxd, z_BxNxLxd.dtype), precision="highest")

    def demultiplex(self, m_BxLxD: Array) -> Array:
        """Mixed rows to states, by projection: `[B, N, L, d]`."""
        return jnp.einsum("ble,nde->bnld", m_BxLxD, jnp.asarray(self.read_NxdxD, m_BxLxD.dtype), precision="highest")


def mixing_matrices(mux: Multiplexer, params: Any) -> np.ndarray:
    """What a linear multiplexer does to each instance, scale included: `[N, D, D]`, found by feeding it unit vectors.

    Args:
      mux: Hadamard or orthogonal.
      params: its parameters, unboxed.

    Raises:
      InputError: the multiplexer is not linear.
    """
    if not isinstance(mux, LINEAR):
        names = ", ".join(cls.__name__ for cls in LINEAR)
        raise InputError(
            f"{type(mux).__name__} looks at what it mixes, so it has no matrix for an instance. Use one that is linear: {names} or a "
            "subclass."
        )
    return np.asarray(_responses(mux, params))


@functools.partial(jax.jit, static_argnums=0)
def _responses(mux: Multiplexer, params: Any) -> Array:
    units = jnp.eye(mux.spec.width, dtype=mux.spec.dtype)

    def response(i: Array) -> Array:
        x_1xNxLxE = jnp.zeros((1, mux.num_instances, *units.shape), units.dtype).at[0, i].set(units)
        return cast(Array, mux.apply({"params": params}, x_1xNxLxE))[0].T

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(response, jnp.arange(mux.num_instances))


def subspaces(matrices_NxDxD: np.ndarray, width: int, key: Array) -> Subspaces:
    """Gives every instance a random `width`-dimensional subspace of what its transformation keeps.

    `R_i` is the pseudo-inverse of `C_i` alone, as a multiplexer's own inverse is; `Subspaces.jointly` reads better where images
    overlap.

    Args:
      matrices_NxDxD: of `mixing_matrices`.
      width: `d` of an instance.
      key: of the subspaces.

    Raises:
      InputError: `N d > D`, or a transformation keeps less than `d` dimensions.
    """
    instances, size = matrices_NxDxD.shape[:2]
    if width < 1 or instances * width > size:
        raise InputError(
            f"{instances} instances of width {width} do not fit into a mixed row of width {size}: N * d <= D must hold and d be "
            f"positive. Use a width from 1 to {size // instances}, or mixed rows of at least {instances * max(width, 1)}."
        )
    draws = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    matrices = matrices_NxDxD.astype(np.float64)
    # The transposed maps whatever it is given into what the matrix keeps.
    enter, triangles = np.linalg.qr(matrices.transpose(0, 2, 1) @ draws.normal(size=(instances, size, width)))
    # Of a matrix in lower precision, rounding alone gives singular values of this size.
    rounding = size * float(jnp.finfo(matrices_NxDxD.dtype).eps)
    for matrix, triangle in zip(matrices, triangles, strict=True):
        diagonal = np.abs(np.diag(triangle))
        if diagonal.min() <= diagonal.max() * rounding and (rank := np.linalg.matrix_rank(matrix, rtol=rounding)) < width:
            raise InputError(
                f"An instance has width {width}, but its transformation keeps only {rank} of {size} dimensions. Use a width of at most "
                f"{rank}, or a wider mixed row."
            )
    write = matrices @ enter
    return Subspaces(enter, write, np.linalg.pinv(write))


def mixed_spec(spec: Spec, instances: int, hidden_size: int = 0) -> Spec:
    """Sizes of the layer that computes `instances` layers of the given sizes; `hidden_size` 0 means `N * d`, the least possible.

    Raises:
      InputError: no instances, or `hidden_size` is less than `N * d` or not divisible by the `N * H` heads.
    """
    if instances < 1:
        raise InputError(f"instances = {instances}, but a mixed row holds at least one. Give 1 or more.")
    heads, least = instances * spec.num_heads, instances * spec.hidden_size
    size = hidden_size or least
    if size < least or size % heads:
        raise InputError(
            f"hidden_size = {size} cannot hold {instances} instances of width {spec.hidden_size} with {spec.num_heads} heads each: it "
            f"must be at least {least} and a multiple of {heads}. The next that fits is {max(least, math.ceil(size / heads) * heads)}."
        )
    return dataclasses.replace(
        spec,
        hidden_size=size,
        embedding_size=0,
        num_heads=heads,
        mlp_dim=instances * spec.mlp_dim,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )


def _fit(single: Any, places: Subspaces, spec: Spec) -> None:
    """Refuses weights of another width, and a network of other sizes than `mixed_spec` gives."""
    instances, size, width = places.write_NxDxd.shape
    given, heads, _ = single["query"]["kernel"].shape
    if given != width:
        raise InputError(
            f"The weights are of an instance of width {given}, but the subspaces have width {width}. Make them with "
            f"subspaces(matrices, {given}, key)."
        )
    if spec.hidden_size != size or spec.num_heads != instances * heads:
        raise InputError(
            f"The mixed layer has hidden_size = {spec.hidden_size} and num_heads = {spec.num_heads}; {instances} instances of {heads} "
            f"heads in rows of width {size} need {size} and {instances * heads}. mixed_spec(spec, {instances}, {size}) gives that."
        )


def attention_weights(single: Any, places: Subspaces, spec: Spec) -> dict[str, dict[str, Array]]:
    """Parameters of one `layers.Attention` of sizes `spec` that computes `N` attentions with weights `single`.

    Heads `i * H ... i * H + H - 1` belong to instance `i`. Where `N d < D`, heads of the mixed layer are wider than those of an
    instance: they are filled up with zeros, and queries grow by the square root of the ratio, by which the scores' scaling
    `1 / sqrt(head_dim)` became too small.

    Args:
      single: parameters of `layers.Attention` or `nn.MultiHeadDotProductAttention` for one instance: kernels `[d, H, d / H]` and
        `[H, d / H, d]` (`out`), with biases or without.
      places: where the instances live.
      spec: of the mixed layer, as `mixed_spec` gives it.

    Raises:
      InputError: widths or heads do not fit together.
    """
    single = nn.unbox(single)
    _fit(single, places, spec)
    dtype = single["query"]["kernel"].dtype
    instances = len(places.read_NxdxD)
    head_dim = single["query"]["kernel"].shape[-1]
    wider = spec.hidden_size // spec.num_heads

    def wide(x: np.ndarray, axis: int) -> Array:
        padding = [(0, wider - head_dim if i == axis % x.ndim else 0) for i in range(x.ndim)]
        return jnp.asarray(np.pad(x, padding), dtype)

    def reader(weights: Mapping[str, Array], scale: float) -> dict[str, Array]:
        kernel = scale * np.asarray(weights["kernel"], np.float64)
        bias = scale * np.asarray(weights.get("bias", np.zeros(kernel.shape[1:])), np.float64)
        kernels = np.einsum("nde,dhk->enhk", places.read_NxdxD, kernel)
        return {
            "kernel": wide(kernels.reshape(spec.hidden_size, spec.num_heads, head_dim), -1),
            "bias": wide(np.tile(bias, (instances, 1)), -1),
        }

    out = np.asarray(single["out"]["kernel"], np.float64)
    kernels = np.einsum("ned,hkd->nhke", places.write_NxDxd, out)
    return {
        "query": reader(single["query"], math.sqrt(wider / head_dim)),
        "key": reader(single["key"], 1.0),
        "value": reader(single["value"], 1.0),
        "out": {
            "kernel": wide(kernels.reshape(spec.num_heads, head_dim, spec.hidden_size), 1),
            "bias": _written(single["out"].get("bias", np.zeros(out.shape[-1], dtype)), places),
        },
    }


def _written(bias_d: Array, places: Subspaces) -> Array:
    """The bias of every instance, in the mixed row."""
    return jnp.asarray(np.einsum("ned,d->e", places.write_NxDxd, np.asarray(bias_d, np.float64)), bias_d.dtype)


def block_weights(single: Any, places: Subspaces, spec: Spec) -> dict[str, Any]:
    """Parameters of one `PlainBlock` of sizes `spec` that computes `N` of them: attention, residual, GELU MLP, residual.

    Args:
      single: parameters of a `layers.Block` or `PlainBlock` for one instance; LayerNorms are left out.
      places: where the instances live.
      spec: of the mixed block, as `mixed_spec` gives it.

    Raises:
      InputError: widths, heads or units of the MLP do not fit together.
    """
    single, instances = nn.unbox(single), len(places.read_NxdxD)
    units = single["mlp_in"]["bias"].shape[-1]
    if spec.mlp_dim != instances * units:
        raise InputError(
            f"The mixed block has mlp_dim = {spec.mlp_dim}; {instances} instances of {units} units need {instances * units}. "
            f"mixed_spec(spec, {instances}, {spec.hidden_size}) gives that."
        )
    inner = {name: np.asarray(value, np.float64) for name, value in single["mlp_in"].items()}
    outer = np.asarray(single["mlp_out"]["kernel"], np.float64)
    dtype = single["mlp_out"]["kernel"].dtype
    return {
        "attention": attention_weights(single["attention"], places, spec),
        "mlp_in": {
            "kernel": jnp.asarray(
                np.einsum("nde,df->enf", places.read_NxdxD, inner["kernel"]).reshape(spec.hidden_size, -1), dtype
            ),
            "bias": jnp.asarray(np.tile(inner["bias"], instances), dtype),
        },
        "mlp_out": {
            "kernel": jnp.asarray(np.einsum("ned,fd->nfe", places.write_NxDxd, outer).reshape(-1, spec.hidden_size), dtype),
            "bias": _written(single["mlp_out"]["bias"], places),
        },
    }


def normed_block_weights(single: Any, places: Subspaces, spec: Spec) -> dict[str, Any]:
    """Parameters of one `InstanceNormBlock` of sizes `spec` that computes `N` post-LN blocks `layers.Block`.

    Args:
      single: parameters of a `layers.Block` for one instance; its LayerNorms are kept.
      places: where the instances live, in orthogonal subspaces of the mixed row.
      spec: of the mixed block, as `mixed_spec` gives it.

    Raises:
      InputError: widths, heads or units of the MLP do not fit together, or the subspaces are not orthogonal.
    """
    single, columns = nn.unbox(single), np.concatenate(places.write_NxDxd, axis=1)
    gram = columns.T @ columns
    overlap = np.abs(gram - np.diag(np.diag(gram))).max() / np.diag(gram).min()
    if overlap > 1e-5:
        raise InputError(
            f"A LayerNorm of single instances needs instances that live in orthogonal subspaces of the mixed row; these overlap by "
            f"{overlap:.2g}, where 1e-5 is allowed. Mix with RandomOrthoLowRank, or with BinaryHadamard without epsilon."
        )
    write_DxNxd = jnp.asarray(places.write_NxDxd.transpose(1, 0, 2), single["mlp_out"]["kernel"].dtype)
    norms = {name: {"write": write_DxNxd, "norm": single[name]} for name in ("attention_norm", "mlp_norm")}
    return {**block_weights(single, places, spec), **norms}


class PlainBlock(Block):
    """The block of `layers.py` without its LayerNorms: attention, residual, GELU MLP, residual."""

    def norm(self) -> Callable[[Array], Array]:
        return lambda x: x


class InstanceNorm(nn.Module):
    """LayerNorm of each instance's own state inside the mixed row, `[..., D] -> [..., D]`; scale and bias are shared by all.

    Attributes:
      spec: of the mixed row.
      num_instances: `N`.
      width: `d` of an instance.
    """

    spec: Spec
    num_instances: int
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return nn.initializers.orthogonal()(key, (shape[0], shape[1] * shape[2]), dtype).reshape(shape)

        shape = (self.spec.hidden_size, self.num_instances, self.width)
        write_DxNxd = parameter(self, "write", orthogonal, ("embed", "instances", None), shape).astype(self.spec.dtype)
        # Orthogonal columns are their own inverse but for their length.
        read_DxNxd = write_DxNxd / jnp.square(write_DxNxd).sum(axis=0)
        norm = nn.LayerNorm(epsilon=self.spec.layer_norm_eps, dtype=self.spec.dtype, name="norm")
        return jnp.einsum("...nd,end->...e", norm(jnp.einsum("...e,end->...nd", x, read_DxNxd)), write_DxNxd)


class InstanceNormBlock(Block):
    """The post-LN block with `InstanceNorm` in the place of LayerNorm."""

    num_instances: int
    width: int

    def norm(self) -> Callable[[Array], Array]:
        return InstanceNorm(self.spec, self.num_instances, self.width)


def stack(block: nn.Module, layers: Sequence[Any], x: Array, mask: Array | None = None) -> Array:
    """`block` with the parameters of each layer in turn, `[..., L, D] -> [..., L, D]`; mask `[..., L]`."""
    for params in layers:
        x = cast(Array, block.apply({"params": params}, x, mask))
    return x
