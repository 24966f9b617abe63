"""Meshes: the same numbers on one device and on eight. Runs in a process of its own, with eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from datamux_jax import sharding
from datamux_jax.errors import InputError
from tests.conftest import small_config

SCRIPT = """
import json, sys, jax, numpy as np
from datamux_jax import sharding, step
from datamux_jax.plan import prepare
from datamux_jax.data import pipeline
from tests.conftest import text_config

def losses(mesh_shape, devices, steps):
    config = text_config(2, **{"retrieval_loss_coeff": 0.1, **json.loads(sys.argv[1])})
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh_shape)))
    make_mesh = sharding.make_mesh
    if devices is not None:
        one = jax.sharding.Mesh(np.array(devices).reshape(1, 1, 1), sharding.AXES)
        sharding.make_mesh = lambda *_: one
    plan = prepare(config)
    sharding.make_mesh = make_mesh
    state = step.born_sharded(plan.make, 0, plan.mesh)
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params))
    data = pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0)
    update, out = None, []
    for _ in range(steps):
        batch = sharding.put_batch(next(data), plan.mesh)
        update = update or step.CompiledStep(step.make_step(plan.objective, plan.tx, state, plan.mesh), state, batch)
        state, sums = update(state, batch)
        out.append(float(sums["loss"][0] / sums["loss"][1]))
    return np.array(out), local

assert jax.device_count() == 8
steps = int(sys.argv[2])
reference, whole = losses((1, 1, 1), jax.devices()[:1], steps)
for shape in json.loads(sys.argv[3]):
    out, local = losses(shape, None, steps)
    np.testing.assert_allclose(out, reference, rtol=1e-5, err_msg=str(shape))
    print(json.dumps({"mesh": shape, "share": local / whole}))
print("same numbers")
"""


MESHES = ((8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))


def same_numbers(changes, steps=5, meshes=MESHES):
    """Share of the parameters that a device holds, by mesh."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(changes), str(steps), json.dumps(meshes)],
        cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert "same numbers" in done.stdout, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {tuple(line["mesh"]): line["share"] for line in found}


WIDE = {"model__dropout_rate": 0.1, "model__num_heads": 8, "model__hidden_size": 32, "model__mlp_dim": 256}


def test_a_mesh_gives_the_numbers_of_one_device_and_splits_the_parameters():
    share = same_numbers(WIDE, meshes=[(2, 2, 2)])
    assert 0.2 < share[2, 2, 2] < 0.4


@pytest.mark.slow
def test_every_mesh_gives_the_numbers_of_one_device():
    share = same_numbers(WIDE, 20)
    # Vectors, norms and the position table of some sizes stay whole.
    assert share[8, 1, 1] == 1
    assert 0.5 < share[4, 2, 1] < 0.6
    assert 0.25 < share[2, 4, 1] < 0.4
    assert 0.2 < share[2, 2, 2] < 0.4
    assert share[1, 1, 8] < 0.7, "the vocabulary of 260 stays whole"


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
        {"objective": "mlm", "retrieval_loss_coeff": 0.0, "remat": "full", "scan_layers": True, "model__num_layers": 2},
        {"objective": "electra", "model__tied_decoder": False},
        {"objective": "states", "distill__teacher": "nobody", "model__num_layers": 2, "demux__name": "mlp"},
    ],
    ids=["contextual-mlp", "ortho-index-mlm", "electra-muxed", "electra-plain", "mlm-scanned", "electra", "states"],
)
def test_every_mesh_gives_the_numbers_of_one_device_for_other_parts(changes):
    same_numbers(changes, 20)


def test_what_does_not_divide_over_the_mesh_stays_whole():
    mesh = AbstractMesh((1, 2, 8), sharding.AXES)
    boxed = {"word": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((260, 16), "float32"), ("vocab", "embed"))}
    assert sharding.shardings(boxed, mesh)["word"].spec == PartitionSpec(None, "fsdp")
    assert sharding.not_split(boxed, mesh) == ["word [260, 16] over tensor = 8"]
    boxed = {"word": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((264, 16), "float32"), ("vocab", "embed"))}
    assert sharding.shardings(boxed, mesh)["word"].spec == PartitionSpec("tensor", "fsdp")
    assert sharding.not_split(boxed, mesh) == []


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "fsdp": 3}])
def test_a_mesh_that_does_not_cover_the_machine_is_refused(axes):
    config = small_config()
    config.mesh.update(axes)
    with pytest.raises(InputError, match=r"does not cover the 1 devices of this machine"):
        sharding.make_mesh(config, 8)
