"""Meshes: the same numbers on one device and on eight. Runs in a process of its own, with eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from datamux_jax import sharding
from datamux_jax.errors import InputError
from tests.conftest import small_config

SCRIPT = """
import json, sys, jax, numpy as np
from datamux_jax import optimizer, sharding, train
from datamux_jax.build import build_generator
from datamux_jax.data import pipeline
from datamux_jax.objectives import OBJECTIVES
from tests.conftest import text_config

def losses(mesh_shape, devices):
    config = text_config(2, retrieval_loss_coeff=0.1, **json.loads(sys.argv[1]))
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_shape)))
    mesh = sharding.make_mesh(config, config.batch_groups) if devices is None else jax.sharding.Mesh(
        np.array(devices).reshape(1, 1, 1), sharding.AXES)
    fmt, splits = pipeline.load(config)
    model = train.build_model(config, fmt)
    tx = optimizer.make(config)
    generator = build_generator(config, model)
    state = train.born_sharded(train.state_maker(config, fmt, model, tx, generator), 0, mesh)
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    step = train.make_step(OBJECTIVES[config.objective](model, config, generator), tx, state, mesh)
    data = pipeline.train_iterator(splits["train"], groups=8, instances=2, seed=0)
    out = []
    for _ in range(5):
        state, sums = step(state, sharding.put_batch(next(data), mesh))
        out.append(float(sums["loss"][0] / sums["loss"][1]))
    return np.array(out), local

assert jax.device_count() == 8
reference, whole = losses((1, 1, 1), jax.devices()[:1])
for shape, share in (((8, 1, 1), 1), ((2, 2, 2), 2.5), ((1, 8, 1), 4)):
    out, local = losses(shape, None)
    np.testing.assert_allclose(out, reference, rtol=1e-5)
    assert local <= whole / share or len(sys.argv) > 2, (shape, local, whole)
print("same numbers")
"""


def same_numbers(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "same numbers" in done.stdout, done.stderr[-3000:]


def test_every_mesh_gives_the_numbers_of_one_device():
    same_numbers(json.dumps({"model__dropout_rate": 0.1}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mux__name": "contextual", "demux__name": "mlp"},
        {"mux__name": "random_ortho", "demux__name": "index", "objective": "mlm", "mask_rate": 0.5},
        {
            "objective": "electra",
            "mask_rate": 0.5,
            "generator__kind": "muxed",
            "model__tied_decoder": False,
            "generator__hidden_size": 16,
        },
        {"objective": "electra", "mask_rate": 0.5, "generator__kind": "plain", "generator__hidden_size": 16},
    ],
    ids=["contextual-mlp", "ortho-index-mlm", "electra-muxed", "electra-plain"],
)
def test_every_mesh_gives_the_numbers_of_one_device_for_other_parts(changes):
    same_numbers(json.dumps(changes), "whatever is replicated")


def test_sizes_that_do_not_divide_over_the_mesh_are_refused():
    from jax.sharding import AbstractMesh

    boxed = {"word": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((260, 16), "float32"), ("vocab", "embed"))}
    with pytest.raises(InputError, match=r"word of shape \(260, 16\) does not divide over the mesh"):
        sharding.check_divides(boxed, AbstractMesh((1, 1, 8), sharding.AXES))


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "fsdp": 3}])
def test_a_mesh_that_does_not_cover_the_machine_is_refused(axes):
    config = small_config()
    config.mesh.update(axes)
    with pytest.raises(InputError, match=r"does not cover the 1 devices of this machine"):
        sharding.make_mesh(config, 8)
