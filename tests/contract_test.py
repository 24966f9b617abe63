"""Every multiplexer with every demultiplexer, family and objective: what all of them promise.

Here a selection in which every pair of choices occurs but for multiplexer and objective, which know of each other only whether a
sequence is classified; `make test-slow` runs the whole matrix.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import optimizer, sharding
from datamux_jax.build import HEADS, build, build_second, init_params
from datamux_jax.demux import DEMUX
from datamux_jax.families import FAMILIES, SpecialTokens
from datamux_jax.mux import MUX
from datamux_jax.objectives import OBJECTIVES
from tests.conftest import text_config

B, N, L, V, C = 2, 3, 10, 40, 4
ORDER = np.array([2, 0, 1])
AXES = (sorted(set(MUX) - {"none"}), sorted(set(DEMUX) - {"none"}), sorted(FAMILIES), sorted(OBJECTIVES))
MATRIX = list(itertools.product(*AXES))


def covering(matrix):
    """Few rows in which every pair of choices occurs, but for the first with the last, found greedily."""

    def pairs(row):
        return {pair for pair in itertools.combinations(enumerate(row), 2) if {axis for axis, _ in pair} != {0, 3}}

    left, chosen = set().union(*map(pairs, matrix)), []
    while left:
        ends = {(row[0], row[3]) for row in chosen}
        best = max(matrix, key=lambda row: (len(pairs(row) & left), (row[0], row[3]) not in ends))
        left -= pairs(best)
        chosen.append(best)
    return chosen


SELECTION = covering(MATRIX)


def tokens_of(family):
    pad = 1 if family == "roberta" else 0
    return SpecialTokens(pad=pad, cls=2, sep=3, mask=4, mlp_first=5, filler=6, index=6 + N, index_cls=6 + N + 1)


def make(mux, demux, family, objective, dtype="float32"):
    config = text_config(
        N,
        mux__name=mux,
        demux__name=demux,
        demux__form="bert" if family == "bert" else "electra",
        model__family=family,
        model__pool="first",
        model__init_stddev=0.3,
        model__type_vocab_size=FAMILIES[family].type_vocab_size,
        model__tied_decoder=FAMILIES[family].tied_decoder,
        model__num_layers=2 if objective == "states" else 1,
        objective=objective,
        retrieval_loss_coeff=0.1,
        mask_rate=0.5,
        dtype=dtype,
        generator__kind="plain" if mux == "contextual" else "muxed",
        generator__hidden_size=16,
        generator__num_layers=1,
        generator__mlp_dim=32,
    )
    model = build(config, num_classes=C, vocab_size=V, max_length=L, tokens=tokens_of(family))
    generator = build_second(config, model)
    return config, model, generator


def random_params(model, generator):
    """Numbers of a usual size, LayerNorm scales around 1: quicker than an initialisation that has to be compiled."""
    shapes = jax.eval_shape(lambda key: init_params(model, key, (1, N, L), "int32", generator), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = path[-1].key == "scale"
        return (offset + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, sharding.unbox(shapes))


def fast_jit(function):
    """Compiles without optimising: every program here runs once or twice."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def _put(leaf, rows, values):
    leaf = leaf.copy()
    leaf[rows] = values
    return leaf


def batch_of(family, objective):
    key = jax.random.key(1)
    mask = jnp.broadcast_to(jnp.arange(L) < jnp.array([L, 7, 5])[:, None], (B, N, L)).astype(jnp.int32)
    ids = jax.random.randint(key, (B, N, L), 6 + N + 2, V).at[..., 0].set(tokens_of(family).cls)
    label = jax.random.randint(key, (B, N), 0, C)
    if objective == "tagging":
        label = jnp.where(mask == 1, ids % C, -100)
    if objective == "regression":
        label = label.astype(jnp.float32)
    inputs = jnp.where(mask == 1, ids, tokens_of(family).pad)
    return {"inputs": inputs, "mask": mask, "label": label, "weight": jnp.ones((B, N))}


def unused(path, demux, objective):
    """Leaves that an objective leaves alone: retrieval and MLM read the vocabulary stack only."""
    parts = path.split("/")
    in_generator = parts[0] == "generator"
    parts = parts[in_generator:]
    if parts[0] != "demux":
        return False
    return (in_generator or HEADS[objective] == "") and parts[1].startswith("task")


def check(mux, demux, family, objective):
    config, model, generator = make(mux, demux, family, objective)
    params = random_params(model, generator)
    batch = batch_of(family, objective)
    compute = OBJECTIVES[objective](model, config, generator)
    rngs = {"corruption": jax.random.key(2), "dropout": jax.random.key(3)}

    # Finite, shaped as said; the gradient reaches what is trained and nothing else.
    value_and_grad = fast_jit(jax.value_and_grad(lambda p: compute(p, batch, rngs, True), has_aux=True))
    (loss, sums), grads = jax.device_get(value_and_grad(params))
    assert loss.shape == ()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, sums, grads)))
    frozen = optimizer.frozen(params, learn_mux=False)
    for path, grad in _flat(grads).items():
        silent = _flat(frozen)[path] or unused(path, demux, objective)
        assert np.any(grad != 0) != silent, path

    # Shapes of states; instances permuted with their parameters permute them.
    def states(params, inputs, mask):
        h = model.apply({"params": params}, inputs, mask, method="encode")
        read = model.apply({"params": params}, h, mask, method="features")
        tokens = model.apply({"params": params}, h, method="token_states")
        vocabulary = model.apply({"params": params}, h, method=lambda m, h: m.demux(h, stack="retrieval"))
        return h, read, tokens, vocabulary

    run = fast_jit(states)
    h, *out = jax.device_get(run(params, batch["inputs"], batch["mask"]))
    fed = L + (N + 1 if demux == "index" else 0)
    width = config.model.hidden_size
    assert [x.shape for x in (h, *out)] == [(B, fed, width), (B, N, width), (B, N, L, width), (B, N, fed, width)]
    moved = _permuted(params, demux, family, model)
    _, *permuted = jax.device_get(run(moved, batch["inputs"][:, ORDER], batch["mask"][:, ORDER]))
    out[2] = out[2][:, :, model.offset :]
    permuted[2] = permuted[2][:, :, model.offset :]
    for a, b in zip(out, permuted, strict=True):
        np.testing.assert_allclose(a[:, ORDER], b, atol=2e-4)
        assert not np.allclose(a, b, atol=1e-2)

    # The dtype of the computation is kept, and read out in float32.
    half = make(mux, demux, family, objective, dtype="bfloat16")[1]
    shapes = jax.eval_shape(lambda: half.apply({"params": params}, batch["inputs"], batch["mask"], method="encode"))
    assert shapes.dtype == jnp.bfloat16
    outputs = jax.eval_shape(lambda: half.apply({"params": params}, batch["inputs"], batch["mask"]))
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}


def _flat(tree):
    return {"/".join(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _permuted(params, demux, family, model):
    """What belongs to an instance, moved with it."""

    def move(path, leaf):
        name = "/".join(str(part.key) for part in path)
        if name == "mux/instance_embedding" or name == "demux/keys":
            return leaf[ORDER]
        if demux == "mlp" and name.startswith(("demux/task/", "demux/retrieval/")):
            return leaf[ORDER]
        if demux == "index" and name == "embeddings/word/embedding":
            rows = model.tokens.index - np.arange(N)
            return _put(leaf, rows, leaf[rows[ORDER]])
        if demux == "index" and name == "embeddings/position":
            start = model.tokens.pad + 1 if FAMILIES[family].positions_from_pads else 0
            return _put(leaf, np.arange(start, start + N), leaf[start : start + N][ORDER])
        return leaf

    return jax.tree_util.tree_map_with_path(move, params)


@pytest.mark.parametrize(("mux", "demux", "family", "objective"), SELECTION)
def test_contract(mux, demux, family, objective):
    check(mux, demux, family, objective)


@pytest.mark.slow
@pytest.mark.parametrize(("mux", "demux", "family", "objective"), [row for row in MATRIX if row not in SELECTION])
def test_contract_of_the_rest(mux, demux, family, objective):
    check(mux, demux, family, objective)
